"""A sweep by its command line: a grid and a search across kills, with points that fail or are stopped."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.files import locked
from dpo_dist.tools.sweep.folder import SweepFolder
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
    with running("sweep", command, tmp_path / "killed.txt") as process:
        wait_until(lambda: is_saved(third), process)
        process.kill()
        wait_until(lambda: run_state(third)["outcome"] == "preempted", _Ended(process.screen))
    assert run_state(first)["outcome"] == "completed"
    finished = (first / "run_state.json").stat().st_mtime_ns

    with locked(RunFolder(elsewhere).lock, "trains"):
        ended = run_verb("sweep", command)
    assert ended.code == 3, ended.output
    assert "optim.weight_decay=1e+38: trained by another process\n" in ended.output
    assert "optim.weight_decay=1e+38: point 4 of 4" in ended.output, "the number that it had before"
    assert (first / "run_state.json").stat().st_mtime_ns == finished, "it was run again"
    results = json.loads((root / "sweep-run/sweep.json").read_text())
    assert (root / "sweep-run/report.html").is_file()
    rows = dict(zip(points, results["points"], strict=True))
    assert [row["outcome"] for row in rows.values()] == [
        *("completed", "trained by another process", "completed", "diverged")
    ]
    assert ["not finite" in row.get("error", "") for row in rows.values()] == [False, False, False, True]
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


def test_points_have_processes_of_a_launcher_and_jobs_of_an_array(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [word for word in small_run(assets, tmp_path) if not word.startswith("run.dir=")]
    root = tmp_path / "root"
    launcher = f"{sys.executable} -m dpo_dist launch --config_file launch/accelerate/cpu_2.yaml"
    command = [*common, f"run.root={root}", "trainer.seed=range(3)", f"sweep.launcher='{launcher}'"]
    array = {"ID": "6", "MIN": "4", "MAX": "8", "STEP": "2", "COUNT": "3"}  # --array=4-8:2
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    ended = run_verb("sweep", command, prepare=fork_python)
    assert ended.code == 0, ended.output
    results = json.loads((root / "sweep-run/sweep.json").read_text())["points"]
    assert [row["outcome"] for row in results] == ["not trained", "completed", "not trained"]
    assert summary(Path(results[1]["run_dir"]))["world_size"] == 2
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "1")  # --array=4,6,8
    irregular = run_verb("sweep", command)
    assert irregular.code == 2
    assert "--array=0-2" in irregular.output


def test_a_search_survives_kills_and_stops_a_bad_point(assets: Path, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    root = tmp_path / "root"
    common = [word for word in small_run(assets, tmp_path) if not word.startswith("run.dir=")]
    common += [f"data.eval=[{assets}/eval.jsonl]", "trainer.epochs=20", "trainer.eval_every=4"]
    file = tmp_path / "space.yaml"
    file.write_text("optim.lr: tag(log, interval(1e-5,1e-3))\n")
    common += ["trainer.save_every=4", "trainer.keep_last=30"]
    command = [*common, str(file), f"run.root={root}", "sweep.by=eval_loss"]
    folder = SweepFolder(root / "sweep-run")
    assert "check passed" in run_verb("sweep", [*command, "sweep.trials=8", "--check"]).output

    def begun() -> list[Path]:
        files = sorted(
            root.glob("run-*/checkpoints/step-000004/state.json"), key=lambda path: path.stat().st_mtime
        )
        return [file.parents[2] for file in files]

    for count in (1, 2):  # the second start continues the first trial
        with running("sweep", [*command, "sweep.trials=8"], tmp_path / f"killed-{count}.txt") as process:
            wait_until(lambda wanted=count: len(begun()) == wanted, process)
            process.kill()
            wait_until(lambda: run_state(begun()[-1])["outcome"] == "preempted", _Ended(process.screen))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder.study)))
    study = optuna.load_study(study_name=None, storage=storage)
    first, second = study.trials
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING"]
    assert run_state(begun()[0])["outcome"] == "completed"
    found = dict.fromkeys(range(4, 80, 4), 1e-3)
    for _ in range(5):  # much better ones, of somebody else
        more = {"distributions": first.distributions, "intermediate_values": found, "value": 1e-3}
        study.add_trial(optuna.trial.create_trial(params=first.params, **more))
    ended = run_verb("sweep", [*command, "sweep.trials=8"])
    assert ended.code == 0, ended.output
    trials = study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", *["COMPLETE"] * 5, "PRUNED"]
    assert (trials[0], trials[1].params) == (first, second.params), "told once; the same values"
    lines = [row for row in history(begun()[0]) if "eval_loss" in row and row["step"] > 0]
    assert first.intermediate_values == {row["step"]: row["eval_loss"] for row in lines}
    assert first.value == lines[-1]["eval_loss"]
    assert len(begun()) == 3
    stopped = run_state(begun()[2])
    assert (stopped["outcome"], stopped["step"] < 80) == ("preempted", True), "stopped as by a signal"
    assert ended.output.count("is worse than the median of other trials") == 2
    results = json.loads(folder.sweep.read_text())
    assert [point["outcome"] for point in results["points"]] == ["completed", "pruned", "pruned"]
    assert results["search"]["trials"] == {"completed": 6, "pruned": 2}
    assert "Search: loss" in folder.report.read_text()
    computed = [summary(run)["reference"]["computed"] for run in begun()]
    assert (computed[0] > 0, computed[2]) == (True, 0), "one pass of the reference"
