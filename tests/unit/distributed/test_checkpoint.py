"""Checkpoints of one process: damage, resuming, deletion, writing behind training, kills."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dpo_dist.config.run_folder import best_checkpoint
from dpo_dist.distributed.checkpoint import saver as checkpoint
from dpo_dist.distributed.checkpoint import slices
from dpo_dist.distributed.checkpoint.saver import (
    MANIFEST,
    SavedSlices,
    drop_checkpoints,
    find_faults,
    remove_unfinished,
)
from dpo_dist.distributed.checkpoint.slices import ModelSlices, Slice, write_slices
from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import content_digest, is_temporary
from tests.support.one_weight import WEIGHTS, Run, Weights

pytestmark = pytest.mark.slow

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written, flushed to disk or not."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.start()
    return run


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_rank_flushes_the_weights_that_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main rank, which commits, may be on another node."""
    flushed = list[Path]()
    monkeypatch.setattr(
        os, "fsync", lambda opened: flushed.append(Path(f"/proc/self/fd/{opened}").readlink())
    )
    write_slices(Weights().shards(), tmp_path, 0)
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == {*flushed}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip(folder / WEIGHTS),
    "a flipped bit of the state": lambda folder: flip(folder / "state.json"),
    "a missing file": lambda folder: (folder / WEIGHTS).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a manifest of nothing": lambda folder: (folder / MANIFEST).write_text("{}"),
    "a manifest that is none": lambda folder: (folder / MANIFEST).write_text("5"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_neither_resumed_nor_ignored(damage: str, run: Run, tmp_path: Path) -> None:
    run.save(50, 100)
    DAMAGE[damage](tmp_path / "step-000100")
    assert run.start() == 50
    assert run.left() == ["step-000050", "step-000100"]
    run.save(75)
    assert run.left() == ["step-000050", "step-000075"]
    for folder in tmp_path.glob("step-*"):
        DAMAGE[damage](folder)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        run.start()


@pytest.mark.parametrize("name", ["../file", "engine/../../file", "/dev/null", "..", ""])
def test_a_manifest_names_files_of_its_own_checkpoint_only(name: str, tmp_path: Path) -> None:
    """In a stranger's checkpoint a device elsewhere would be read for ever."""
    folder, outside = tmp_path / "step-000001", tmp_path / "file"
    (folder / "engine").mkdir(parents=True)
    outside.touch()
    (folder / MANIFEST).write_text(json.dumps({name: content_digest([outside])}))
    (fault,) = find_faults(folder, 0, 1)
    assert fault.startswith(MANIFEST)


def test_folders_with_other_names_are_not_checkpoints(run: Run, tmp_path: Path) -> None:
    run.save(1, 2)
    shutil.copytree(tmp_path / "step-000002", tmp_path / "step-000002-best")
    run.save(3, 4)
    assert run.left() == ["step-000002-best", "step-000003", "step-000004"]
    (tmp_path / "step-000005.tmp-0123456789ab").mkdir()
    drop_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002-best"]


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1)
    run.start()
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
        run.weights.weight.fill_(step)
        run.saver.save(step, {"step": step, "best": best}, best_step=best)
    run.commit()
    assert run.left() == ["step-000003", "step-000005"]
    assert best_checkpoint(tmp_path) == "step-000003"
    drop_checkpoints(tmp_path)
    assert run.left() == ["step-000003"]
    assert (tmp_path / "latest").read_text() == "step-000003"
    assert run.start() == 3
    run.save(6)  # without keep_best
    assert run.left() == ["step-000006"]
    assert not (tmp_path / "best").exists()


def test_training_does_not_wait_until_old_checkpoints_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_delete, delete = threading.Event(), shutil.rmtree

    def delete_slowly(path: Path) -> None:
        assert may_delete.wait(20)
        delete(path)

    run = Run(tmp_path, keep_last=1)
    run.start()
    run.save(1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", delete_slowly)
    run.saver.save(2, {"step": 2})
    run.saver.commit()
    assert (tmp_path / "latest").read_text() == "step-000002"
    assert len(names(tmp_path)) == 3, "the old one is still on the disk"
    may_delete.set()
    run.save(3)
    assert names(tmp_path) == ["latest", "step-000003"]


def test_the_last_checkpoint_always_exists_and_is_that_of_the_highest_step(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=0)
    run.start()
    run.save(999_999, 1_000_000)
    assert run.left() == ["step-1000000"]
    assert run.start() == 1_000_000


def test_training_waits_where_memory_has_no_room(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run.saver._say = said.append
    monkeypatch.setattr(slices, "available_memory", lambda: 0)
    for step in (1, 2):
        run.weights.weight.fill_(step)
        run.saver.save(step, {"step": step})
        run.weights.weight.fill_(7)
    run.commit()
    assert run.start() == 2
    assert len(said) == 1
    assert "host memory has no room" in said[0]


@pytest.mark.parametrize("available", [2**40, 0], ids=["behind", "at once"])
def test_a_full_disk_is_one_error_at_the_next_step_and_leaves_nothing(
    available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "available_memory", lambda: available)
    run = Run(tmp_path)
    run.start()
    run.save(1)
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(checkpoint, "write_slices", full)
    with pytest.raises(CheckpointError, match="No space left on device; a checkpoint needs"):
        run.save(2)
    assert not run.saver.is_written
    assert run.left() == ["step-000001"]
    assert run.start() == 1


def test_a_checkpoint_folder_that_cannot_be_written_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.start()
    monkeypatch.setattr(checkpoint, "write_slices", Mock(side_effect=PermissionError(errno.EACCES, "denied")))
    with pytest.raises(CheckpointError, match="make sure that this folder can be written, and run") as raised:
        run.save(1)
    assert "disk space" not in str(raised.value)


def test_weights_are_written_without_a_copy_of_them_and_read_in_every_type(tmp_path: Path) -> None:
    types = {torch.bfloat16: 5, torch.float32: 2**20, torch.float16: 1}
    wanted = [
        Slice(str(dtype), (count,), 0, {"weight": torch.arange(count).to(dtype)})
        for dtype, count in types.items()
    ]
    tracemalloc.start()
    entries = write_slices(ModelSlices("engine", wanted), tmp_path, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20  # of 4 MiB
    (tmp_path / MANIFEST).write_text(json.dumps(entries))
    assert find_faults(tmp_path, 0, 1) == []
    with safe_open(tmp_path / next(iter(entries)), "pt") as opened:
        for own in wanted:
            assert torch.equal(opened.get_tensor(f"weight/{own.name}"), own.parts["weight"])


@pytest.mark.parametrize("ends", [[7], [3, 7], [1, 2, 7], [2, 4, 6, 7]], ids=str)
def test_states_of_any_ranges_are_read_into_any_others(ends: list[int], tmp_path: Path) -> None:
    """As ranks have written them that shard a weight of seven numbers over other numbers of ranks."""
    whole = {part: torch.rand(7) for part in ("weight", "exp_avg", "exp_avg_sq", "ema")}

    def cut(ends: list[int], values: Mapping[str, Tensor]) -> list[Slice]:
        places = zip([0, *ends[:-1]], ends, strict=True)
        return [
            Slice("w", (7,), start, {part: each[start:end] for part, each in values.items()})
            for start, end in places
        ]

    entries = {}
    for rank, piece in enumerate(cut(ends, whole)):
        entries |= write_slices(ModelSlices("engine", [piece], step=3), tmp_path, rank)
    (tmp_path / MANIFEST).write_text(json.dumps(entries))
    saved = SavedSlices.find(tmp_path, "engine")
    assert (set(saved.parts), saved.step) == (set(whole), 3)
    for others in ([7], [4, 7], [1, 5, 6, 7]):
        read = {part: torch.full((7,), -1.0) for part in whole}
        saved.load_into(cut(others, read))
        for part, values in whole.items():
            assert torch.equal(read[part], values), (part, others)


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Do `work` in a fork that is killed before its `number`-th change of files; return whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in _CHANGES or (event == "open" and arguments[2] & os.O_CREAT):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def prepared(root: Path, keep_last: int, *steps: int) -> Path:
    root.mkdir()
    run = Run(root, keep_last)
    run.start()
    run.save(*steps)
    return root


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def kills(before: Path, keep_last: int, work: Callable[[Run], None]) -> Iterator[tuple[Run, bool]]:
    """Starts of a copy of `before` in which `work` was killed at each change of files, and at last not."""
    for number in range(1, 1000):
        run = Run(Path(shutil.copytree(before, before.with_name(str(number)))), keep_last)
        run.start()
        was_killed = killed_at(number, lambda run=run: work(run))  # type: ignore[misc]
        yield run, was_killed
        if not was_killed:
            return


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_kill_at_any_moment_of_a_save_leaves_the_last_or_the_new_checkpoint(
    keep_last: int, tmp_path: Path
) -> None:
    def save(run: Run) -> None:
        run.weights.weight.fill_(3)
        run.saver.save(3, {"step": 3})
        run.weights.weight.fill_(4)  # the next step, while it is written
        run.commit()

    ends = []
    for run, _ in kills(prepared(tmp_path / "before", keep_last, 1, 2), keep_last, save):
        remove_unfinished(run.root)
        step = run.start()
        ends.append(step)
        left = names(run.root)
        assert not [name for name in left if is_temporary(Path(name))]
        assert f"step-{step:06d}" in left
        run.save(step + 1)
        kept = [f"step-{each:06d}" for each in range(step + 2 - keep_last, step + 2)]
        assert names(run.root) == ["latest", *kept]
    assert ends == sorted(ends)
    assert set(ends) == {2, 3}
    assert ends.count(2) >= 5, "kills while it is written"
    assert ends.count(3) >= 5, "kills after it is committed: while others are deleted"


def save_best(run: Run, step: int) -> None:
    run.weights.weight.fill_(step)
    run.saver.save(step, {"step": step, "best": step}, best_step=step)
    run.commit()


def test_a_kill_at_any_moment_of_a_save_leaves_the_best_checkpoint(tmp_path: Path) -> None:
    """Also between the commit of the last checkpoint and the list of the best, if no other commit follows."""
    before, ends = prepared(tmp_path / "before", 1), set()
    first = Run(before, keep_last=1)
    first.start()
    save_best(first, 1)
    for run, was_killed in kills(before, 1, partial(save_best, step=2)):
        root = run.root
        assert was_killed or best_checkpoint(root) == "step-000002", "each commit names the best"
        remove_unfinished(root)
        best = f"step-{run.start():06d}"
        ends.add(best)
        assert best_checkpoint(root) == best
        assert (root / "latest").read_text() == best
        assert names(root) == ["best", "latest", best]
        drop_checkpoints(root)
        assert names(root) == ["best", "latest", best]
    assert ends == {"step-000001", "step-000002"}


def test_a_kill_while_a_checkpoint_replaces_that_of_its_step(tmp_path: Path) -> None:
    """As where a stopped run saves its step again."""
    for run, _ in kills(prepared(tmp_path / "before", 1, 1), 1, lambda run: run.save(1)):
        remove_unfinished(run.root)
        assert run.start() == 1
        assert names(run.root) == ["latest", "step-000001"]
