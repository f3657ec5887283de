"""The page about two runs: settings that differ, metrics with intervals, names; texts inert."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.insight.pages.difference import names_of, write_difference
from tests.unit.insight.pages.made_run import HOSTILE, Page, made_run

Runs = tuple[RunFolder, RunFolder]


def page_of(first: RunFolder, second: RunFolder) -> Page:
    return Page(write_difference((first, second), 2.0, first.path.parent / "page.html").read_text())


def change(file: Path, *keys: str, value: Any) -> None:
    """Set a nested value of a JSON or YAML file."""
    content = yaml.safe_load(file.read_text())
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    file.write_text(json.dumps(content) if "json" in file.suffix else yaml.safe_dump(content))


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return made_run(tmp_path / "a"), made_run(tmp_path / "b")


def test_settings_that_differ_are_named_and_equal_ones_are_not(runs: Runs) -> None:
    assert "All settings of the training are equal." in page_of(*runs).text
    change(runs[1].config, "optim", "lr", value=5e-6)
    change(runs[1].config, "tracking", "project", value="mine")
    settings = page_of(*runs).section("Settings").split("Results")[0]
    assert "setting A B optim.lr 1e-06 5e-06 Other settings, versions and hardware that differ" in settings
    assert "tracking.project not recorded mine" in settings
    assert "model.path" not in settings


def test_metrics_are_side_by_side_and_say_whether_intervals_overlap(runs: Runs) -> None:
    results = page_of(*runs).section("Results")
    assert "rewards/accuracies 0.625 [0.55, 0.7] 0.625 [0.55, 0.7] +0 overlap" in results
    rows = json.loads(runs[1].log_history.read_text())
    rows[-1]["eval_rewards/accuracies"] = 0.9
    runs[1].log_history.write_text(json.dumps(rows))
    training = runs[1].evaluation_of(LAST_EVALUATION).results
    change(training, "all", "intervals", "eval_rewards/accuracies", value=[0.85, 0.95])
    results = page_of(*runs).section("Results")
    assert "rewards/accuracies 0.625 [0.55, 0.7] 0.9 [0.85, 0.95] +0.275 do not overlap" in results
    assert "rewards/accuracies/math 0.55 [0.45, 0.65] 0.55 [0.45, 0.65] +0 overlap" in results


def test_values_that_are_not_comparable_are_said(runs: Runs) -> None:
    assert "comparable" not in page_of(*runs).text
    for run, digest, beta in zip(runs, "xy", (0.1, 0.5), strict=True):
        change(run.state, "identity", "eval_data", value=digest)
        change(run.state, "identity", "reference", value=digest)
        change(run.config, "loss", "beta", value=beta)
        change(run.config, "loss", "kind", value=f"loss {digest}")
    text = page_of(*runs).section("Results")
    assert " overlap " not in text.split("metric A B")[1]
    assert "evaluated on different data: their metrics are not comparable." in text
    assert "Their reference models differ" in text
    assert "Their losses differ" in text
    assert "multiples of beta, which differs (0.1 and 0.5), and the loss depends on it" in text


def test_values_that_are_comparable_are_compared_beside_others(runs: Runs) -> None:
    for run, beta in zip(runs, (0.1, 0.5), strict=True):
        change(run.config, "loss", "beta", value=beta)
    text = page_of(*runs).section("Results")
    assert "rewards/accuracies 0.625 [0.55, 0.7] 0.625 [0.55, 0.7] +0 overlap" in text
    assert "rewards/margins 0.5 [0.4, 0.6] 0.5 [0.4, 0.6] rewards/both_fall" in text


def test_verdicts_time_and_cost_are_side_by_side(runs: Runs) -> None:
    change(runs[1].summary, "train_seconds", value=8420.8)
    page = page_of(*runs)
    assert "A: a/qwen-sigmoid-3fa9c1d2 completed Does not generalise: plain." in page.section(
        page.text.split("\n")[0]
    )
    assert "train seconds 1 h 10 min 2 h 20 min \u00d7 2 " in page.section("Results")
    assert "cost 8.00 8.00 \u00d7 1" in page.section("Results")


def test_runs_have_the_names_that_distinguish_them() -> None:
    assert names_of([RunFolder(Path("/x/a")), RunFolder(Path("/x/b"))]) == ["a", "b"]
    assert names_of([RunFolder(Path("/x/a")), RunFolder(Path("/y/a"))]) == ["x/a", "y/a"]
    assert names_of([RunFolder(Path("/r/a")), RunFolder(Path("/r/r/a"))])[0].endswith("r/a")


def test_texts_are_inert_and_tags_match(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    first, second = made_run(folder / "a", HOSTILE, HOSTILE), made_run(folder / "b", f"{HOSTILE}2", HOSTILE)
    page = page_of(first, second)
    assert not {"img", "script"} & set(page.tags)
    assert [name for name, _ in page.attributes if name.startswith("on")] == []
    assert "onerror" in page.text


def test_one_empty_run_has_a_page(tmp_path: Path) -> None:
    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    empty.config.write_text("{}")
    page = page_of(made_run(tmp_path), empty)
    assert "not ended" in page.text
    assert "Results" not in page.text
