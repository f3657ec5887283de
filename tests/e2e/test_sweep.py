"""A sweep by its command line: a grid across kills, with points that fail or are stopped."""

import json
import os
import signal
from pathlib import Path

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.files import locked
from dpo_dist.tools.sweep.points import load_points
from tests.e2e.conftest import small_run
from tests.support.launch import history, run_state, run_verb, running, summary, train, wait_until
from tests.support.warm_launch import fork_python

GRID = ["loss.kind=sigmoid,ipo", "optim.weight_decay=0,1e38"]


def test_a_grid_is_finished_across_stops_and_equals_runs_by_themselves(assets: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    common = [word for word in small_run(assets, tmp_path) if not word.startswith("run.dir=")]
    common += [f"data.eval=[{assets}/eval.jsonl]", "trainer.epochs=3", "trainer.save_every=2"]
    command = [*common, f"run.root={root}", *GRID]
    points = {words: Path(str(point.run.dir)) for words, point in load_points(command).items()}
    first, elsewhere, third, diverges = points.values()
    checked = run_verb("sweep", [*command, "--check"]).output
    assert checked.count("check passed: everything that needs no weights") == 1, checked
    for words, run in points.items():
        assert checked.count(f"{' '.join(words)}: {run} (new)\n") == 1, checked

    def is_saved(run: Path) -> bool:
        return any(run.glob("checkpoints/step-*/state.json"))

    with running("sweep", command, tmp_path / "terminated.txt") as process:
        wait_until(lambda: is_saved(first), process)
        os.kill(process.pid, signal.SIGTERM)
        process.join(240)
        assert process.exitcode == 75, process.screen.read_text()
    assert "stopped: the same command continues" in process.screen.read_text()
    assert run_state(first)["outcome"] == "preempted"
    with running("sweep", command, tmp_path / "killed.txt", prepare=fork_python) as process:
        wait_until(lambda: is_saved(third), process)
        process.kill()
        wait_until(lambda: run_state(third)["outcome"] == "preempted", _Ended(process.screen))
    assert run_state(first)["outcome"] == "completed"
    finished = (first / "run_state.json").stat().st_mtime_ns

    with locked(RunFolder(elsewhere).lock, "trains"):
        ended = run_verb("sweep", command, prepare=fork_python)
    assert ended.code == 2, ended.output
    assert "optim.weight_decay=1e+38: invalid" in ended.output
    assert "optim.weight_decay=1e+38: point 4 of 4" in ended.output, "the number that it had before"
    assert (first / "run_state.json").stat().st_mtime_ns == finished, "it was run again"
    results = json.loads((root / "sweep-run/sweep.json").read_text())
    assert (root / "sweep-run/report.html").is_file()
    rows = dict(zip(points, results["points"], strict=True))
    assert [row["outcome"] for row in rows.values()] == [*("completed", "invalid", "completed", "diverged")]
    errors = [row.get("error", "") for row in rows.values()]
    assert ["another process" in error for error in errors] == [False, True, False, False]
    assert ["not finite" in error for error in errors] == [False, False, False, True]
    assert f"({root}/sweep-run/logs/{diverges.name}.log)" in ended.output
    assert "Their losses differ" in ended.output, "they are not ranked"
    for words, run in points.items():
        if rows[words]["outcome"] == "completed":
            alone = tmp_path / "alone" / run.name
            train([*common, *words, f"run.dir={alone}"])
            assert history(run) == history(alone)
            assert summary(run)["final"] == summary(alone)["final"]
            assert rows[words]["metrics"].items() <= summary(alone)["final"].items()
    computed = [summary(run)["reference"]["computed"] for run in (first, third)]
    assert computed[0] > 0, "the first point fills the store"
    assert computed[1] == 0


class _Ended:
    """A process that nobody asks whether it is alive."""

    def __init__(self, screen: Path):
        self.screen = screen

    def is_alive(self) -> bool:
        return True


def test_the_jobs_of_an_array_divide_the_points(assets: Path, tmp_path: Path) -> None:
    common = [word for word in small_run(assets, tmp_path) if not word.startswith("run.dir=")]
    root = tmp_path / "root"
    command = [*common, f"run.root={root}", "trainer.seed=range(3)"]
    ended = run_verb("sweep", [*command, "sweep.part=2/3"], prepare=fork_python)
    assert ended.code == 0, ended.output
    results = json.loads((root / "sweep-run/sweep.json").read_text())["points"]
    assert [row["outcome"] for row in results] == ["not trained", "completed", "not trained"]
    assert summary(Path(results[1]["run_dir"]))["world_size"] == 1
