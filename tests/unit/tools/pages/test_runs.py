"""Several runs, on a page and as a table: settings that differ, the best values, what cannot be compared."""

import html
import json
import re
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.report.__main__ import main
from dpo_dist.tools.report.runs import compare_runs, differing_settings
from tests.unit.tools.pages.made_run import change, made_run, text_of, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    """Three runs of different names."""
    for name in "abc":
        made_run(tmp_path / name).path.rename(tmp_path / f"run-{name}")
    return [RunFolder(tmp_path / f"run-{name}") for name in "abc"]


def compared(runs: list[RunFolder]) -> tuple[list[str], str]:
    """The lines for the terminal, and the text of the page."""
    page = runs[0].path.parent / "page.html"
    lines = compare_runs(runs, page)
    return [" ".join(line.split()) for line in lines], text_of(page)


def change_last_row(run: RunFolder, values: dict[str, float]) -> None:
    *rows, last = json.loads(run.log_history.read_text())
    write_rows(run, [*rows, last | values])


def end_with(run: RunFolder, accuracy: float, *ends: float) -> None:
    """Give the last evaluation of a run another accuracy."""
    change_last_row(run, {"eval_rewards/accuracies": accuracy})
    intervals = {"eval_rewards/accuracies": ends, "eval_rewards/margins": (0.4, 0.6)}
    known = {name: both for name, both in intervals.items() if both}
    change(run.last_evaluation.results, "all", "intervals", value=known)


def test_settings_that_differ_are_those_that_are_not_equal_in_all() -> None:
    configs = [
        {"optim": {"lr": 1e-6, "betas": [0.9, 0.95]}, "model": {"path": "a"}, "loss": {"terms": []}},
        {"optim": {"lr": 1e-6, "betas": [0.9, 0.95]}, "model": {"path": "a"}},
        {"optim": {"lr": 5e-6, "betas": [0.9, 0.95]}, "model": {"path": "a"}, "loss": {"terms": []}},
    ]
    assert differing_settings(configs) == {
        "optim.lr": ["1e-06", "1e-06", "5e-06"],
        "loss.terms": ["[]", "-", "[]"],
    }
    assert differing_settings(configs[:1] * 3) == {}


def test_the_table_has_what_differs_and_marks_the_best(runs: list[RunFolder]) -> None:
    lines, page = compared(runs)
    assert lines[0] == "run outcome loss accuracy margin both fall"
    assert lines[1] == "run-a completed 0.4100 0.625 [0.550, 0.700] 0.500 [0.400, 0.600] 0.600"
    assert "All settings of the training are equal." in page
    assert "*" not in "".join(lines)
    change(runs[1].config, "optim", "lr", value=5e-6)
    change(runs[1].config, "tracking", "project", value="mine")
    end_with(runs[1], 0.9, 0.85, 0.95)
    runs[2].summary.unlink()
    lines, page = compared(runs)
    assert lines[0] == "run optim.lr outcome loss accuracy margin both fall"
    assert "run-b 5e-06 completed 0.4100 0.900* [0.850, 0.950] 0.500 [0.400, 0.600] 0.600" in lines
    assert "run-c 1e-06 not ended - - - -" in lines
    assert [line for line in lines if line in page] == lines
    shown = page.rpartition("Settings")[2].partition("Curves")[0]
    assert "optim.lr 1e-06 5e-06 1e-06" in shown
    assert "tracking.project" not in shown, "it changes no result"
    assert "model.path" not in shown
    assert "rewards/accuracies/math 0.550 [0.450, 0.650] 0.550 [0.450, 0.650] -" in page


def test_what_is_not_comparable_has_a_warning_and_no_best(runs: list[RunFolder]) -> None:
    end_with(runs[1], 0.9, 0.85, 0.95)
    change(runs[2].config, "loss", "beta", value=0.5)
    change_last_row(runs[2], {"eval_loss": 0.1, "eval_rewards/margins": 3.0})
    lines, page = compared(runs)
    assert "0.900* [0.850, 0.950]" in lines[2]
    assert "*" not in lines[3]
    assert lines[-1] == "Their losses differ: compare accuracies, not losses, rewards and margins."
    for run, digest in zip(runs, "xxy", strict=True):
        change(run.state, "identity", "eval_data", value=digest)
        change(run.state, "identity", "reference", value=digest)
    lines, page = compared(runs)
    assert "*" not in "".join(lines)
    for line in lines[-3:]:
        assert line.startswith("Their ")
        assert line in page


def test_more_settings_than_the_table_has_room_for_are_on_the_page_only(runs: list[RunFolder]) -> None:
    for key in "abcde":
        change(runs[0].config, "trainer", key, value=1)
    lines, page = compared(runs)
    assert "5 settings differ: see the page" in lines
    for run, seed in zip(runs, (1, 1, 2), strict=True):
        change(run.config, "trainer", "seed", value=seed)
    lines, page = compared(runs)
    assert any(line.startswith("all others 2 of 2 0.4100 \u00b1") for line in lines)
    assert "trainer.e 1 - -" in page


def test_curves_are_over_pairs(runs: list[RunFolder]) -> None:
    change(runs[1].config, "trainer", "global_batch_pairs", value=32)
    change(runs[1].summary, "pairs_seen", value=960)
    compared(runs)
    page = (runs[0].path.parent / "page.html").read_text()
    first = json.loads(html.unescape(re.findall('data-chart="([^"]*)"', page)[0]))
    assert [line["xs"][-1] for line in first["lines"]] == [1920, 1920, 960, 960, 1920, 1920]


def test_runs_of_the_same_name_are_named_by_their_paths(tmp_path: Path) -> None:
    lines, _ = compared([made_run(tmp_path / "a"), made_run(tmp_path / "b")])
    assert [line.split()[0] for line in lines[1:3]] == [
        str(tmp_path / name / "qwen-sigmoid-3fa9c1d2") for name in "ab"
    ]


def test_the_verb_writes_a_page_of_several_runs_to_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = made_run(tmp_path / "a"), RunFolder(tmp_path / "empty")
    second.path.mkdir()
    second.config.write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main([str(first), str(second)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split() == ["empty", "not", "ended", *"----"]
    assert printed[-1] == "report: runs.html"
    assert "empty not ended" in text_of(tmp_path / "runs.html")
    assert main([str(first), str(second), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()


def test_losses_of_other_kinds_name_runs_and_share_no_axis(runs: list[RunFolder]) -> None:
    """A loss without beta has none, whatever is configured."""
    for run, kind, beta in zip(runs, ("sigmoid", "simpo", "orpo"), (0.1, 2.0, 0.3), strict=True):
        options = {"gamma": 1.0} if kind == "simpo" else None
        change(run.config, "loss", value={"kind": kind, "beta": beta, "terms": [], "options": options})
    lines, page = compared(runs)
    assert lines[3].startswith("run-c - orpo - completed 0.4100")
    for label, kind in (("beta 0.1, kind sigmoid", "sigmoid"), ("beta 2, kind simpo, gamma 1", "simpo")):
        assert f"Loss, {kind} {label}" in page
    assert ("Loss, orpo" in page, "above rejected, orpo" in page) == (True, False)


def test_points_of_a_sweep_are_named_by_what_was_swept(runs: list[RunFolder]) -> None:
    """The other settings follow from the kind."""
    kinds, seeds = ("ipo", "ipo", "simpo"), ("0", "1", "0")
    for run, kind, seed in zip(runs, kinds, seeds, strict=True):
        options = {"length_average": True} if kind == "ipo" else {"gamma": 0.5}
        change(run.config, "loss", value={"kind": kind, "beta": 0.1, "terms": [], "options": options})
        change(run.config, "reference", value={"mode": "cached" if kind == "ipo" else "none"})
        change(run.config, "trainer", "seed", value=int(seed))
    points = [{"loss.kind": kind, "trainer.seed": seed} for kind, seed in zip(kinds, seeds, strict=True)]
    file = runs[0].path.parent / "page.html"
    lines = [" ".join(line.split()) for line in compare_runs(runs, file, points=points)]
    assert lines[0].startswith("run loss.kind trainer.seed outcome")
    assert [line.split(" 2 of 2")[0].split(" 1 of 1")[0] for line in lines[6:8]] == ["kind ipo", "kind simpo"]
    results, _, rest = text_of(file).rpartition("Settings")
    assert "Loss, ipo kind ipo" in rest
    assert "length_average" in rest, "it differs"
    assert "length_average" not in results


def test_a_run_without_a_kind_of_loss_is_compared(runs: list[RunFolder]) -> None:
    change(runs[0].config, "loss", value={"kind": None, "beta": 0.1, "terms": []})
    lines, _ = compared(runs)
    assert len(lines) > len(runs)


def test_runs_that_differ_in_their_seeds_have_a_mean_and_a_spread(runs: list[RunFolder]) -> None:
    """The best is a mean, never one of the seeds."""
    for run, beta, seed, accuracy in zip(runs, (0.1, 0.1, 0.2), (1, 2, 1), (0.6, 0.9, 0.7), strict=True):
        change(run.config, "loss", "beta", value=beta)
        change(run.config, "trainer", "seed", value=seed)
        change(run.config, "data", "train", value=[{"path": f"/data/of/{beta}.jsonl", "weight": 1}])
        end_with(run, accuracy)
    lines, page = compared(runs)
    assert "*" not in "".join(lines[:4])
    assert lines[5] == "setting seeds loss accuracy margin both fall"
    assert lines[6].startswith(
        "train [{path: /data/of/0.1.jsonl, weight: 1}], beta 0.1 2 of 2 0.4100 \u00b1 0.0000 0.750*"
    )
    assert lines[7].startswith(
        "train [{path: /data/of/0.2.jsonl, weight: 1}], beta 0.2 1 of 1 0.4100 0.700 0.500"
    )
    assert lines[6] in page
    change(runs[2].config, "loss", "beta", value=0.1)
    change(runs[2].config, "data", "train", value=[{"path": "/data/of/0.1.jsonl", "weight": 1}])
    change(runs[2].config, "trainer", "seed", value=3)
    lines, _ = compared(runs)
    assert lines[6].startswith("all 3 of 3 0.4100 \u00b1 0.0000 0.733 \u00b1 0.153 0.500"), (
        "nothing to be the best of"
    )
    change(runs[2].summary, "exit", value="diverged")
    assert compared(runs)[0][6].startswith("all 2 of 3 0.4100 \u00b1 0.0000 0.750 \u00b1 0.212")


def test_a_pattern_of_folders_skips_and_counts_those_without_a_run(
    runs: list[RunFolder], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `report output/*` names them, beside the caches of data and log-probs."""
    above = runs[0].path.parent
    monkeypatch.chdir(above)
    (above / "encoded").mkdir()
    (above / "runs.txt").touch()
    given = [str(path) for path in sorted(above.iterdir()) if path.name.startswith(("run-", "enc", "runs.t"))]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert f"2 paths without a run: {above / 'encoded'}, {above / 'runs.txt'}" in printed.err
    assert [name in printed.out for name in ("run-a", "run-b", "run-c", "encoded")] == [True] * 3 + [False]
    assert main([str(above / "encoded"), str(runs[0].path)]) == 0, "one of several is a run"
    for wrong in ([str(above / "encoded")], [str(above / "encoded"), str(above / "runs.txt")]):
        with pytest.raises(ConfigError, match="run director"):
            main(wrong)
    with pytest.raises(ConfigError, match="no run directory"):
        main([str(runs[0].path), str(above / "run-aa")])  # mistyped: nothing is there
