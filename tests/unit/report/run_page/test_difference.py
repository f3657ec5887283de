"""The page about two runs: settings, metrics with intervals, the same pairs, samples, names; texts inert."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.insight.pages.difference import names_of, write_difference
from tests.unit.report.run_page.made_run import HOSTILE, Page, made_run


def page_of(first: RunFolder, second: RunFolder) -> Page:
    return Page(write_difference((first, second), None, first.path.parent / "page.html").read_text())


def change(file: Path, *keys: str, value: Any) -> None:
    """Set a nested value of a JSON or YAML file."""
    content = yaml.safe_load(file.read_text())
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    file.write_text(json.dumps(content) if "json" in file.suffix else yaml.safe_dump(content))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    return made_run(tmp_path / "a"), made_run(tmp_path / "b")


Runs = tuple[RunFolder, RunFolder]


def test_settings_that_differ_are_named_and_equal_ones_are_not(runs: Runs) -> None:
    assert "All settings that define the result are equal." in page_of(*runs).text
    change(runs[1].config, "optim", "lr", value=5e-6)
    change(runs[1].config, "tracking", "project", value="mine")
    settings = page_of(*runs).section("Settings").split("Results")[0]
    assert "setting A B optim.lr 1e-06 5e-06 Other settings that differ" in settings
    assert "tracking.project not recorded mine" in settings
    assert "model.path" not in settings


def test_metrics_are_side_by_side_and_say_whether_intervals_overlap(runs: Runs) -> None:
    results = page_of(*runs).section("Results")
    assert "rewards/accuracies 0.625 [0.55, 0.7] 0.625 [0.55, 0.7] 0 overlap" in results
    rows = json.loads(runs[1].log_history.read_text())
    rows[-1]["eval_rewards/accuracies"] = 0.9
    runs[1].log_history.write_text(json.dumps(rows))
    training = runs[1].evaluation_of(LAST_EVALUATION).results
    change(training, "all", "intervals", "eval_rewards/accuracies", value=[0.85, 0.95])
    results = page_of(*runs).section("Results")
    assert "rewards/accuracies 0.625 [0.55, 0.7] 0.9 [0.85, 0.95] +0.275 do not overlap" in results
    assert "math: accuracy 0.55 [0.45, 0.65] 0.55 [0.45, 0.65] 0 overlap" in results


def test_values_that_are_not_comparable_are_said(runs: Runs) -> None:
    assert "comparable" not in page_of(*runs).text
    for run, digest, beta in zip(runs, "xy", (0.1, 0.5), strict=True):
        change(run.state, "identity", "eval_data", value=digest)
        change(run.state, "identity", "reference", value=digest)
        change(run.config, "loss", "beta", value=beta)
        change(run.config, "loss", "kind", value=f"loss {digest}")
    text = page_of(*runs).section("Results")
    assert "overlap" not in text
    assert "The same pairs" not in text
    assert "evaluated on different data: their metrics are not comparable." in text
    assert "Their reference models differ" in text
    assert "Their losses differ" in text
    assert "multiples of beta, which differs (0.1 and 0.5), and the loss depends on it" in text


def test_values_that_are_comparable_are_compared_beside_others(runs: Runs) -> None:
    for run, beta in zip(runs, (0.1, 0.5), strict=True):
        change(run.config, "loss", "beta", value=beta)
    text = page_of(*runs).section("Results")
    assert "rewards/accuracies 0.625 [0.55, 0.7] 0.625 [0.55, 0.7] 0 overlap" in text
    assert "rewards/margins 0.5 [0.4, 0.6] 0.5 [0.4, 0.6] rewards/both_fall" in text


def write_scores(run: RunFolder, margins: list[float | None], first_line: int = 1) -> None:
    rows = [
        {"source": "a", "line": line, "tokens_chosen": 3, "tokens_rejected": 4, "margin": margin}
        for line, margin in enumerate(margins, start=first_line)
    ]
    file = run.evaluation_of(LAST_EVALUATION).scores
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_same_pairs_are_counted_by_which_run_is_right(runs: Runs) -> None:
    write_scores(runs[0], [1.0, 1.0, -1.0, -1.0, 1.0, 1.0])
    write_scores(runs[1], [1.0, -1.0, 1.0, -1.0, 1.0, None])  # a margin that is not a number is not counted
    same = page_of(*runs).section("The same pairs")
    assert "both 2 only A 1 only B 1 neither 1" in same
    assert "pair by pair: 0 [-0.554, +0.554]" in same
    assert math.isclose(1.96 * math.sqrt(2 / 5 / 5), 0.554, abs_tol=1e-3)


def test_outcomes_that_are_equal_for_every_pair_have_no_interval(runs: Runs) -> None:
    for run in runs:
        write_scores(run, [1.0, -1.0, 1.0])
    same = page_of(*runs).section("The same pairs")
    assert "pair by pair: 0, the same for every pair, so that it has no interval." in same


def test_a_tie_counts_half_as_in_the_accuracy(runs: Runs) -> None:
    """An untrained run has an accuracy of one half, not of 0."""
    write_scores(runs[0], [0.0, 0.0, 0.0, 0.0])
    write_scores(runs[1], [1.0, 1.0, 1.0, -1.0])
    same = page_of(*runs).section("The same pairs")
    assert "counted as half 4" in same
    assert "pair by pair: +0.25 [-0.174, +0.674]" in same
    assert math.isclose(1.96 * math.sqrt((0.25 - 0.25**2) / 4), 0.424, abs_tol=1e-3)


@pytest.mark.parametrize("other", [([1.0], 1), ([1.0, 1.0], 2), ([], 1)])
def test_other_pairs_are_not_compared(runs: Runs, other: tuple[list[float | None], int]) -> None:
    write_scores(runs[0], [1.0, 1.0])
    write_scores(runs[1], *other)
    assert "The same pairs" not in page_of(*runs).text


@pytest.mark.parametrize("damaged", [[0], [1], [0, 1]])
def test_a_damaged_line_costs_its_pair_only(runs: Runs, damaged: list[int]) -> None:
    for number, run in enumerate(runs):
        write_scores(run, [1.0] * 8 + [-1.0])
        file = run.evaluation_of(LAST_EVALUATION).scores
        lines = file.read_text().splitlines(keepends=True)
        if number in damaged:
            file.write_text("".join([lines[0], "{\n", *lines[2:]]))
    same = page_of(*runs).section("The same pairs")
    assert "both 7 only A 0 only B 0 neither 1" in same
    assert "Without 1 pair: their line of a scores.jsonl cannot be read." in same


def test_curves_of_both_are_in_the_same_charts(runs: Runs) -> None:
    page = write_difference(runs, None, runs[0].path.parent / "page.html").read_text()
    loss = page.split("<figcaption><b>Loss</b>")[1].split("</figure>")[0]
    assert loss.count("(evaluation)") == 2
    assert loss.count('<path class="raw c0"') == loss.count('<path class="raw c1"') == 2  # steps and hours
    assert page.count("axis-switch") > 0


def test_responses_of_both_to_the_same_prompt_are_side_by_side(runs: Runs) -> None:
    change(runs[1].samples_file(30), "policy", value="quite another text")
    shown = page_of(*runs).section("Responses of both")
    assert "A, step 30 3 tokens plain" in shown
    assert "quite another text reference" in shown
    assert shown.count("reference") == 1
    change(runs[1].samples_file(30), "prompt_id", value="other")
    assert "Responses of both" not in page_of(*runs).text


def test_time_and_cost_are_side_by_side(runs: Runs) -> None:
    change(runs[1].summary, "train_seconds", value=8420.8)
    times = page_of(*runs).section("Time, memory and cost")
    assert "time: training steps 1 h 10 min 2 h 20 min 2 " in times
    assert "cost 6.05 11.90 1.97" in times


def test_speeds_are_means_over_time(runs: Runs) -> None:
    rows = json.loads(runs[1].log_history.read_text())
    rows[-2] |= {"tokens_per_second": 64000.0, "mfu": 0.9}
    runs[1].log_history.write_text(json.dumps(rows))
    times = page_of(*runs).section("Time, memory and cost")
    assert "tokens per second 6,400 8,320 1.3 MFU of the measured peak 40 % 42 %" in times


def test_runs_have_the_names_that_distinguish_them() -> None:
    assert names_of([RunFolder(Path("/x/a")), RunFolder(Path("/x/b"))]) == ("a", "b")
    assert names_of([RunFolder(Path("/x/a")), RunFolder(Path("/y/a"))]) == ("x/a", "y/a")
    assert names_of([RunFolder(Path("/r/a")), RunFolder(Path("/r/r/a"))])[0].endswith("r/a")


def test_texts_are_inert_and_tags_match(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    first, second = made_run(folder / "a", HOSTILE, HOSTILE), made_run(folder / "b", f"{HOSTILE}2", HOSTILE)
    page = page_of(first, second)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert [name for name, _ in page.attributes if name.startswith("on")] == []
    assert "onerror" in page.text


def test_one_empty_run_has_a_page(tmp_path: Path) -> None:
    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    empty.config.write_text("{}")
    page = page_of(made_run(tmp_path), empty)
    assert "not ended" in page.text
    assert "Results" not in page.text
