"""A process killed at any operation on files while it saves: the next start has the right checkpoint."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.run_folder import best_checkpoints
from dpo_dist.distributed.checkpoint import drop_checkpoints, remove_unfinished
from dpo_dist.foundation import files
from tests.support.one_weight import Run

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written, flushed to disk or not."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


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
        run.saver.commit()

    ends = []
    for run, _ in kills(prepared(tmp_path / "before", keep_last, 1, 2), keep_last, save):
        remove_unfinished(run.root)
        step = run.start()
        ends.append(step)
        left = names(run.root)
        assert not [name for name in left if files.is_temporary(Path(name))]
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
    run.saver.save(step, {"step": step, "best": [{"step": step}]})
    run.saver.commit()


def test_a_kill_at_any_moment_of_a_save_leaves_the_best_checkpoint(tmp_path: Path) -> None:
    """Also between the commit of the last checkpoint and the list of the best, if no other commit follows."""
    before, ends = prepared(tmp_path / "before", 1), set()
    first = Run(before, keep_last=1)
    first.start()
    save_best(first, 1)
    for run, was_killed in kills(before, 1, partial(save_best, step=2)):
        root = run.root
        assert was_killed or best_checkpoints(root) == ["step-000002"], "each commit lists the best"
        remove_unfinished(root)
        best = f"step-{run.start():06d}"
        ends.add(best)
        assert best_checkpoints(root) == [best]
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
