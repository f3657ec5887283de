"""A mirrored run whose machine is lost again and again, also while it uploads, ends as one that never was."""

import random
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import small_run
from tests.e2e.test_kills import REACH, STEPS, KillPoint
from tests.support.killed_runs import assert_same_run
from tests.support.launch import run_verb, train

KILLS = 2


def command(assets: Path, folder: Path, mirror: Path | str) -> list[str]:
    kept = ["trainer.keep_last=1", "trainer.keep_best=eval_rewards/accuracies", "trainer.final=best"]
    data = [f"data.eval=[{assets}/eval.jsonl]", "trainer.eval_every=2", f"data.cache={folder}/encoded"]
    return [*small_run(assets, folder), *STEPS, *kept, *data, f"run.mirror={mirror}"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_machines_are_lost_resumes_from_its_mirror(
    processes: int, assets: Path, tmp_path: Path
) -> None:
    """Each machine has its own disk, and is killed at a random file operation on it or on the mirror."""
    whole, drawn = KillPoint(tmp_path / "whole"), random.Random(processes)
    whole.folder.mkdir()
    ended = whole.start(command(assets, whole.folder, whole.folder / "mirror"), processes)
    assert ended.code == 0, ended.output
    assert "has the whole run" in ended.output
    machine, restored = tmp_path / "machine", 0
    machine.mkdir()
    kills = code = 0
    while code or not kills:
        operation = int(whole.pluralize(0) * drawn.uniform(0.45, REACH)) if kills < KILLS else 0
        ended = KillPoint(machine, operation).start(command(assets, machine, machine / "mirror"), processes)
        assert "Traceback" not in ended.output, ended.output
        code, restored = ended.code, restored + ("restoring step" in ended.output)
        if code:
            kills += 1
            assert kills <= KILLS, ended.output
            for path in (machine / "run", machine / "store", machine / "encoded"):
                shutil.rmtree(path, ignore_errors=True)
    assert restored
    assert_same_run(machine, whole.folder)
    shutil.rmtree(machine / "run")
    shutil.copytree(machine / "mirror", machine / "run")
    assert_same_run(machine, whole.folder)


def test_a_mirror_that_fails_ends_no_run_and_is_completed_later(assets: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    words = [*command(assets, tmp_path, mirror)]
    stopped = run_verb("train", [*words, "trainer.stop_after_steps=2"])
    assert stopped.code == 75, stopped.output
    (mirror / "checkpoints").rename(tmp_path / "away")
    (mirror / "checkpoints").touch()
    ended = train(words)
    assert ended.output.count("warning: the mirror") == 2, "fails, is behind"
    (mirror / "checkpoints").unlink()
    assert "has the whole run" in train(words).output
    check = run_verb("train", [*words, f"run.dir={tmp_path}/other", "--check"])
    assert f"{mirror}, which can be written" in check.output
    other = run_verb("train", [*words, f"run.dir={tmp_path}/other", "loss.beta=0.3"])
    assert other.code == 2
    assert "the mirror has another run" in other.output
    assert not (tmp_path / "other").exists()
