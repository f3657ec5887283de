"""What a sweep records of its points: how each ended, its metrics with intervals, and a line of a check."""

import json
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError, RunOutcome
from dpo_dist.foundation.types import CheckReport
from dpo_dist.tools.sweep import __main__ as sweep
from dpo_dist.tools.sweep.folder import SweepFolder
from dpo_dist.tools.sweep.points import Points, load_points
from dpo_dist.tools.sweep.results import sweep_lines, sweep_results
from dpo_dist.tools.sweep.training import is_finished, point_end, screen_since
from dpo_dist.training.start.run_state import RunState, write_state
from tests.unit.tools.pages.made_run import change, made_run


def points_in(folder: Path, *words: str) -> Points:
    return load_points(["model.path=m", "data.train=[a.jsonl]", f"run.root={folder}", *words])


def test_results_have_the_metrics_of_finished_points_with_intervals(tmp_path: Path) -> None:
    points = points_in(tmp_path, "trainer.seed=range(3)")
    done, failed, _ = points
    made = made_run(tmp_path / "made")
    change(made.state, "outcome", value="completed")
    made.path.rename(RunFolder(points[done].run.path).path)
    folder = SweepFolder(tmp_path / "sweep")
    results = sweep_results(points, {failed: ("diverged", "not finite")}, folder)
    assert json.loads(folder.sweep.read_text()) == results
    first, second, third = results["points"]
    assert first["settings"] == {"trainer.seed": 0}
    assert first["outcome"] == "completed"
    assert first["metrics"]["eval_rewards/accuracies"] == 0.625
    assert first["intervals"]["eval_rewards/accuracies"] == [0.55, 0.7]
    assert set(first["intervals"]) <= set(first["metrics"])
    assert (second["outcome"], second["error"]) == ("diverged", "not finite")
    assert (third["outcome"], "error" in third, "metrics" in third) == ("not trained", False, False)
    lines = sweep_lines(results, points, folder.report)
    assert lines == [
        f"trainer.seed=1: diverged: not finite ({second['screen']})",
        "trainer.seed=2: not trained",
    ]


@pytest.mark.parametrize(
    ("code", "outcome", "error"),
    [
        (0, "completed", ""),
        (75, "preempted", ""),
        (2, "invalid", "configuration error: no"),
        (1, "failed", "configuration error: no"),
        (3, "diverged", "configuration error: no"),
        (-9, "signal 9", "configuration error: no"),
        (127, "exit code 127", "configuration error: no"),
        (143, "signal 15", "configuration error: no"),
    ],
)
def test_a_point_ends_as_its_own_start_says(code: int, outcome: str, error: str, tmp_path: Path) -> None:
    screen = tmp_path / "screen"
    former = "configuration error: another process is training in this run directory\n"
    screen.write_text(former)
    assert point_end(code, screen_since(screen, len(former))) == (outcome, "")
    screen.write_text(f"{former}step 1\nconfiguration error: no\n  to do: x\n\n")
    assert point_end(code, screen_since(screen, len(former))) == (outcome, error)


def test_a_point_is_finished_if_its_run_is_complete_with_its_settings(tmp_path: Path) -> None:
    config, other = points_in(tmp_path, "loss.beta=0.1,0.2").values()
    run = RunFolder(config.run.path)
    run.path.mkdir()
    assert not is_finished(config)
    same = {"run_digest": config.identity.digest}
    for outcome, identity, expected in (
        (RunOutcome.completed, same, True),
        (RunOutcome.preempted, same, False),
        (RunOutcome.completed, {"run_digest": other.identity.digest}, False),
    ):
        write_state(run, RunState(outcome, 3, identity))
        assert is_finished(config) is expected


def test_a_check_has_a_line_for_each_point_and_loads_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = list[RunConfig]()

    def check(config: RunConfig, **_: object) -> CheckReport:
        loaded.append(config)
        return CheckReport([("run.dir", str(config.run.dir)), ("loss", str(config.loss.kind))])

    monkeypatch.setattr("dpo_dist.training.start.dry_run.dry_run", check)
    monkeypatch.setattr(sweep, "check_points", lambda points: None)
    points = points_in(tmp_path, "loss.kind=sigmoid,ipo", "trainer.seed=range(3)")
    facts = sweep.check(points).facts
    assert loaded == [next(iter(points.values()))]
    wanted = [(" ".join(words), f"{config.run.dir} (new)") for words, config in points.items()]
    assert facts == [*wanted, ("run.dir", str(loaded[0].run.dir)), ("loss", "sigmoid")]


def test_a_sweep_in_several_processes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On several nodes each point would train on the first one alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="starts the processes of its points itself"):
        sweep.check_points(points_in(tmp_path, "loss.beta=0.1,0.2"))
