"""Checkpoints that are written while training continues: exact, committed or dropped, errors at a border."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dpo_dist.distributed import checkpoint, slices
from dpo_dist.distributed.checkpoint import latest_checkpoint
from dpo_dist.foundation.errors import CheckpointError
from tests.support.alone import ALONE
from tests.support.one_weight import Run
from tests.support.slow_disk import slow_disk


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.start()
    return run


def begin(run: Run, step: int) -> None:
    run.weights.weight.fill_(step)
    run.saver.save(step, {"step": step})


def content(folder: Path) -> dict[str, Any]:
    """Everything but state and manifest; the order of a file's metadata varies."""
    found: dict[str, Any] = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                tensors = {key: opened.get_tensor(key).tolist() for key in opened.keys()}  # noqa: SIM118
                found[name] = tensors, opened.metadata()
        elif file.is_file() and name not in ("state.json", "manifest.json"):
            found[name] = file.read_bytes()
    return found


def test_a_checkpoint_written_behind_is_that_written_at_once(run: Run, tmp_path: Path) -> None:
    at_once = Run(tmp_path / "at_once")
    at_once.start()
    at_once.weights.weight.fill_(1)
    at_once.saver.save(1, {"step": 1}, is_last=True)
    at_once.saver.commit()
    running = {"reward": 0.5}
    with slow_disk() as disk:
        run.weights.weight.fill_(1)
        run.saver.save(1, {"step": 1, "running": running})
        assert not run.saver.is_written
        run.weights.weight.fill_(2)  # the next step
        torch.rand(3)
        running["reward"] = 0.7
        disk.set()
        run.saver.commit()
    first, second = (content(folder / "step-000001") for folder in (tmp_path, tmp_path / "at_once"))
    assert len(first) == 2
    assert first == second
    found = latest_checkpoint(tmp_path, ALONE)
    assert found is not None
    assert found.state == {"step": 1, "running": {"reward": 0.5}, "world_size": 1}


def test_a_second_save_waits_for_the_first(run: Run) -> None:
    with slow_disk() as disk:
        begin(run, 1)
        assert run.left() == [run.saver._pending.temporary.name]  # type: ignore[union-attr]
        threading.Timer(0.1, disk.set).start()
        begin(run, 2)
        assert "step-000001" in run.left()
        run.saver.commit()
    assert run.left() == ["step-000001", "step-000002"]
    assert run.start() == 2


def test_training_waits_where_memory_has_no_room(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run.saver._say = said.append
    monkeypatch.setattr(slices, "available_memory", lambda: 0)
    for step in (1, 2):
        begin(run, step)
        run.weights.weight.fill_(7)
    run.saver.commit()
    assert run.start() == 2
    assert len(said) == 1
    assert "host memory has no room" in said[0]


def test_the_last_one_is_not_copied(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices.HostCopy, "of", lambda *_: pytest.fail("copied"))
    run.weights.weight.fill_(1)
    run.saver.save(1, {"step": 1}, is_last=True)
    run.saver.commit()
    assert run.start() == 1


def full(*_: Any) -> list[Path]:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("available", [2**40, 0], ids=["behind", "at once"])
def test_a_full_disk_is_one_error_at_the_next_step_and_leaves_nothing(
    available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "available_memory", lambda: available)
    run = Run(tmp_path)
    run.start()
    run.save(1)
    monkeypatch.setattr(checkpoint, "write_slices", full)

    def step() -> None:
        begin(run, 2)
        while not run.saver.is_written:
            pass
        run.saver.commit()

    with pytest.raises(CheckpointError, match="No space left on device; a checkpoint needs"):
        step()
    assert not run.saver.is_written
    assert run.left() == ["step-000001"]
    assert run.start() == 1


def test_a_run_directory_that_vanishes_is_one_error_and_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run" / "checkpoints")
    run.start()
    run.save(1)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="a checkpoint cannot be written"):
        run.save(2)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [path.name for path in (tmp_path / "moved/checkpoints").iterdir() if path.is_dir()] == [
        "step-000001"
    ]
    run.saver.close()


def test_a_checkpoint_that_is_not_committed_is_dropped_by_the_next_start(run: Run) -> None:
    run.save(1)
    begin(run, 2)
    run.saver.close()
    assert len(run.left()) == 2
    checkpoint.remove_unfinished(run.root)
    assert run.left() == ["step-000001"]
    assert run.start() == 1
