"""Save, find and load checkpoints that are complete or absent (law L4).

All ranks write a checkpoint under a temporary name; a manifest lists its files with sizes and digests. Then
the folder is renamed, `latest` and `best` are updated, and after that older checkpoints are deleted. Only
files that match a manifest are loaded. Training continues while the files are flushed to disk in the
background.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo_dist.atomic import commit_folder, is_temporary, temporary_name, write_text
from dpo_dist.config.checkpoint_folders import (
    BEST,
    STATE,
    best_checkpoints,
    checkpoint_folders,
    checkpoint_name,
)
from dpo_dist.distributed.checkpoint_manifest import (
    Entries,
    damaged_checkpoint,
    describe_files,
    find_faults,
    has_all_files,
    write_manifest,
)
from dpo_dist.distributed.random_states import load_random_states, save_random_states
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError
from dpo_dist.progress_file import note_progress

log = logging.getLogger(__name__)

_LATEST = "latest"


class Sharded(Protocol):
    """Weights that training changes, saved in slices: the policy, and a reference updated from it."""

    def save_shards(self, folder: Path) -> list[Path]:
        """Write this rank's slices below `folder` and return their files; not collective.

        Raises:
            OSError: the files cannot be written.
        """
        ...

    def load_shards(self, folder: Path) -> None:
        """Read what `save_shards` wrote on any number of ranks; collective.

        Raises:
            CheckpointError: a file cannot be read, or is not of this model.
        """
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        folder: the folder of its files.
        state: the loop's state.
        damaged: names of newer checkpoints that are damaged.
    """

    folder: Path
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pending:
    """A written checkpoint that is flushed to disk in the background."""

    temporary: Path
    folder: Path
    entries: "Future[Entries]"


class CheckpointSaver:
    """Save the checkpoints of one run below `root` and keep the newest `keep_last`, at least one.

    `damaged` names checkpoints that are not counted, and are deleted after the next commit.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        parts: Sequence[Sharded],
        world: World,
        damaged: Iterable[str] = (),
    ):
        self._root, self._keep_last = root, max(1, keep_last)
        self._parts, self._world = parts, world
        self._damaged = set(damaged)
        self._disk = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._best: list[str] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write `root/step-NNNNNN`, which appears with the next `commit` or `save`; collective.

        Raises:
            CheckpointError: this checkpoint or the one before cannot be written.
        """
        self.commit()
        self._best = [checkpoint_name(one["step"]) for one in state.get("best", [])]
        world, folder = self._world, self._root / checkpoint_name(step)
        temporary = Path(world.on_main(lambda: _create(temporary_name(folder))))
        written = world.together(lambda: _write(temporary, self._parts, state, world))
        entries = self._disk.submit(_described, written, temporary)
        self._pending = _Pending(temporary, folder, entries)

    @property
    def is_ready(self) -> bool:
        """Return whether this rank's files of a pending checkpoint are on disk; not collective."""
        return self._pending is not None and self._pending.entries.done()

    def commit(self) -> None:
        """Wait for the pending checkpoint, if any, and make it the latest; collective.

        Raises:
            CheckpointError: the disk is full or failed; checkpoints committed before are unchanged.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        mine = self._world.together(pending.entries.result)
        entries = {name: entry for part in self._world.gather(mine) for name, entry in part.items()}
        self._world.on_main(lambda: _commit(pending.temporary, pending.folder, entries))
        self._damaged.discard(pending.folder.name)
        self._world.on_main(lambda: _mark_best(self._root, self._best))
        kept = self._best
        self._world.on_main(lambda: _delete_old(pending.folder, self._keep_last, self._damaged, kept))


def latest_checkpoint(root: Path, world: World) -> Checkpoint | None:
    """Return the newest checkpoint whose files match its manifest; None without checkpoints. Collective.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    folders = world.on_main(lambda: checkpoint_folders(root))
    damaged: list[str] = []
    for folder in folders:
        damage = _damage(folder, world)
        if not damage:
            return Checkpoint(folder, _state(folder, world), tuple(damaged))
        log.warning("checkpoint %s is damaged and not used: %s", folder, "; ".join(damage[:5]))
        damaged.append(folder.name)
    if folders:
        raise CheckpointError(
            "every checkpoint of this run is damaged",
            where=str(root),
            got=f"{', '.join(damaged)}; {damage[0]}",
            remedy="restore the folder, or delete it to start from the beginning",
        )
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state in a checkpoint, whose files are not checked; not collective."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def open_checkpoint(folder: Path, world: World) -> Checkpoint:
    """Return the checkpoint in a folder; collective.

    Raises:
        CheckpointError: its files do not match its manifest.
    """
    if damage := _damage(folder, world):
        raise damaged_checkpoint(folder, damage)
    return Checkpoint(folder, _state(folder, world))


def _damage(folder: Path, world: World) -> list[str]:
    """Return the faults of all files of a checkpoint, divided among the ranks; collective."""
    faults = world.gather(find_faults(folder, world.rank, world.size))
    return [fault for of_rank in faults for fault in of_rank]


def _state(folder: Path, world: World) -> dict[str, Any]:
    return world.on_main(lambda: read_state(folder))


def load_checkpoint(checkpoint: Checkpoint, parts: Sequence[Sharded], world: World) -> None:
    """Restore weights, optimizer and random states on any number of ranks; collective.

    Raises:
        CheckpointError: a file cannot be read, or is not of this model.
    """
    for part in parts:
        part.load_shards(checkpoint.folder)
    saved_ranks = checkpoint.state["world_size"]
    world.together(lambda: load_random_states(checkpoint.folder, world.rank, saved_ranks, world.device))


def drop_checkpoints(root: Path) -> None:
    """Delete every checkpoint below `root` but the best ones; on one rank."""
    unfinished = [folder for folder in root.glob("step-*") if is_temporary(folder)]
    best = best_checkpoints(root)
    others = [folder for folder in checkpoint_folders(root) if folder.name not in best]
    for folder in [*others, *unfinished]:
        shutil.rmtree(folder, ignore_errors=True)
    if not best:
        (root / _LATEST).unlink(missing_ok=True)


def _create(folder: Path) -> str:
    """Create `folder` and return it; first remove unfinished checkpoints beside it, to make room."""
    for unfinished in folder.parent.glob("step-*"):
        if is_temporary(unfinished):
            shutil.rmtree(unfinished, ignore_errors=True)
    with _disk_errors(folder):
        folder.mkdir(parents=True)
    return str(folder)


def _write(folder: Path, parts: Sequence[Sharded], state: dict[str, Any], world: World) -> list[Path]:
    """Write this rank's files and return them."""
    with _disk_errors(folder):
        written = [file for part in parts for file in part.save_shards(folder)]
        written.append(save_random_states(folder, world.rank, world.device))
        if world.is_main:
            written.append(folder / STATE)
            written[-1].write_text(json.dumps({**state, "world_size": world.size}, indent=1))
    return written


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raise a `CheckpointError` for an `OSError` inside the block."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "a checkpoint cannot be written",
            where=str(folder),
            got=str(error),
            remedy="make room and run the same command again: it resumes from the last checkpoint",
        ) from error


def _described(files: Sequence[Path], folder: Path) -> Entries:
    with _disk_errors(folder):
        return describe_files(files, folder)


def _commit(temporary: Path, folder: Path, entries: Entries) -> None:
    with _disk_errors(folder):
        write_manifest(temporary, entries)
        commit_folder(temporary, folder)
        write_text(folder.parent / _LATEST, folder.name)
    note_progress(str(folder))


def _mark_best(root: Path, best: Sequence[str]) -> None:
    with _disk_errors(root):
        if best:
            write_text(root / BEST, "".join(f"{name}\n" for name in best))
        else:
            (root / BEST).unlink(missing_ok=True)


def _delete_old(committed: Path, keep_last: int, damaged: set[str], best: Sequence[str]) -> None:
    """Delete all checkpoints but `committed`, the best and the newest complete ones, checked by size only."""
    others = [folder for folder in checkpoint_folders(committed.parent) if folder != committed]
    complete = [folder for folder in others if folder.name not in damaged and has_all_files(folder)]
    kept = {*complete[: keep_last - 1], *(folder for folder in complete if folder.name in best)}
    for folder in set(others) - kept:
        shutil.rmtree(folder, ignore_errors=True)
