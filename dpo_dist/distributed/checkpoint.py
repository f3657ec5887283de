"""Save checkpoints that are complete or absent (law L4).

All ranks write a checkpoint under a temporary name; a manifest lists its files with sizes and digests. Then
the folder is renamed, `latest` and `best` are updated, and after that older checkpoints are deleted. Only
files that match a manifest are loaded. Training continues while copies of the weights are written in the
background.
"""

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.config.run_folder import (
    BEST,
    STATE,
    best_checkpoints,
    checkpoint_folders,
    checkpoint_name,
    step_of,
)
from dpo_dist.distributed.checkpoint_files import random_states, random_states_name
from dpo_dist.distributed.manifest import Entries, has_all_files, write_file, write_manifest
from dpo_dist.distributed.slices import HostCopy, ModelSlices, Sharded, write_slices
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import (
    commit_folder,
    final_name,
    is_temporary,
    recover_folder,
    temporary_name,
    write_text,
)
from dpo_dist.foundation.process import note_progress
from dpo_dist.foundation.text import size

log = logging.getLogger(__name__)

_LATEST = "latest"


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is not committed yet, as one rank writes it.

    Attributes:
        temporary: the folder that is written.
        folder: its final name.
        bytes: of the whole checkpoint.
        entries: of this rank's files, once they are on disk; or the error.
    """

    temporary: Path
    folder: Path
    bytes: int
    entries: Future[Entries] = field(default_factory=Future)

    def write(
        self, models: Sequence[ModelSlices], texts: dict[str, str], rank: int, staging: HostCopy | None = None
    ) -> None:
        """Write the files of this rank, and set `entries`.

        Args:
            models: the slices; copies, if training changes the tensors meanwhile.
            texts: of the small files, by name.
            rank: of this process.
            staging: memory through which tensors of a GPU are written.
        """
        try:
            entries: Entries = {}
            with disk_errors(self.temporary, self.bytes):
                for model in models:
                    entries |= write_slices(model, self.temporary, rank, staging)
                for name, text in texts.items():
                    entries[name] = write_file(self.temporary / name, text.encode())
            self.entries.set_result(entries)
        except BaseException as error:  # raised by `entries`, in the main thread
            self.entries.set_exception(error)


class CheckpointSaver:
    """Save the checkpoints of one run below `root` and keep the newest `keep_last`, at least one.

    Args:
        root: folder of the checkpoints; its parent, the run directory, exists.
        keep_last: number of checkpoints to keep.
        parts: the weights.
        world: of this start.
        damaged: names of checkpoints that are not counted, and are deleted after the next commit.
        behind: copy the weights to host memory, where it has room, and write them while training continues.
        say: called with a warning on every rank.
        committed: called on rank 0 with the step of each committed checkpoint.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        parts: Sequence[Sharded],
        world: World,
        damaged: Iterable[str] = (),
        *,
        behind: bool = True,
        say: Callable[[str], None] = log.warning,
        committed: Callable[[int], None] = lambda _step: None,
    ):
        self._root, self._keep_last = root, max(1, keep_last)
        self._parts, self._world = parts, world
        self._damaged = set(damaged)
        self._copy, self._behind = HostCopy(world.device), behind
        self._say, self._has_said = say, False
        self._committed = committed
        self._pending: _Pending | None = None
        self._best: list[str] = []

    def save(self, step: int, state: dict[str, Any], *, is_last: bool = False) -> None:
        """Write `root/step-NNNNNN`, which appears with the next `commit` or `save`; collective.

        Training may continue at once. A former checkpoint is committed first.

        Args:
            step: in the name.
            state: of the loop.
            is_last: training does not continue, so that nothing is copied.

        Raises:
            CheckpointError: this checkpoint or the one before cannot be written.
        """
        self.commit()
        self._best = [checkpoint_name(one["step"]) for one in state.get("best", [])]
        world, folder = self._world, self._root / checkpoint_name(step)
        models = [part.shards() for part in self._parts]
        texts = {random_states_name(world.rank): random_states(world.device)}
        if world.is_main:
            texts[STATE] = json.dumps({**state, "world_size": world.size}, indent=1)
        needed = sum(world.gather(sum(model.bytes for model in models) + sum(map(len, texts.values()))))
        temporary = Path(world.on_main(lambda: self._create(temporary_name(folder))))
        self._pending = pending = _Pending(temporary, folder, needed)
        if not is_last and self._can_copy(models):
            models = self._copy.of(models)
            work = threading.Thread(target=pending.write, args=(models, texts, world.rank), daemon=True)
            work.start()
            return
        pending.write(models, texts, world.rank, self._copy)
        self._copy.close()  # host memory is short, or training ends
        if any(world.gather(pending.entries.exception() is not None)):
            self.commit()  # which raises the error on all ranks

    def _create(self, folder: Path) -> str:
        """Create `folder` and return it; first remove unfinished checkpoints beside it, to make room."""
        with disk_errors(folder):
            remove_unfinished(self._root)
            self._root.mkdir(exist_ok=True)
            folder.mkdir()
        return str(folder)

    def _can_copy(self, models: Sequence[ModelSlices]) -> bool:
        """Return whether all ranks copy their slices; say once if there is no room for it. Collective."""
        if not self._behind:
            return False
        has_room = self._copy.has_room(models, self._world)
        if not has_room and not self._has_said:
            self._say(
                "training waits while a checkpoint is written: host memory has no room for a copy of it"
            )
            self._has_said = True
        return has_room

    @property
    def is_written(self) -> bool:
        """Return whether this rank's files of a pending checkpoint are on disk, or failed; not collective.

        When they are on all ranks, the checkpoint can be committed without a wait.
        """
        return self._pending is not None and self._pending.entries.done()

    def commit(self) -> None:
        """Wait for the pending checkpoint, if any, and make it the latest; collective.

        Raises:
            CheckpointError: the disk is full or failed; checkpoints committed before are unchanged.
        """
        pending, self._pending, world = self._pending, None, self._world
        if pending is None:
            return
        try:
            mine = world.together(pending.entries.result)
            entries = {name: entry for part in world.gather(mine) for name, entry in part.items()}
            world.on_main(lambda: self._commit(pending, entries))
        except CheckpointError:
            if world.is_main:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise
        self._damaged.discard(pending.folder.name)
        kept = self._best
        world.on_main(lambda: _mark_best(self._root, kept))
        # Some file systems need minutes to delete files of terabytes.
        world.on_main(lambda: _delete_old(pending.folder, self._keep_last, self._damaged, kept))

    def _commit(self, pending: _Pending, entries: Entries) -> None:
        with disk_errors(pending.temporary, pending.bytes):
            write_manifest(pending.temporary, entries)
            commit_folder(pending.temporary, pending.folder)
            write_text(self._root / _LATEST, pending.folder.name)
            note_progress(str(pending.folder))
            self._committed(step_of(pending.folder.name) or 0)

    def resume(self, folder: Path, best_steps: Iterable[int]) -> None:
        """Complete what a kill may have cut after the commit of the checkpoint that is resumed; collective.

        Args:
            folder: of the checkpoint.
            best_steps: steps of the best checkpoints, the best first.

        Raises:
            CheckpointError: `latest` or `best` cannot be written.
        """
        best = [checkpoint_name(step) for step in best_steps]

        def complete() -> None:
            with disk_errors(folder):
                write_text(self._root / _LATEST, folder.name)
            _mark_best(self._root, best)
            if not self._damaged:  # deleted after the next commit, as are the others then
                _delete_old(folder, self._keep_last, set(), best)

        self._world.on_main(complete)

    def close(self) -> None:
        """End the saver; not collective. After an error, a checkpoint that is not committed is dropped."""
        self._pending = None
        self._copy.close()


@contextlib.contextmanager
def disk_errors(folder: Path, needed: int = 0) -> Iterator[None]:
    """Raise a `CheckpointError` for an `OSError` inside the block.

    Args:
        folder: of the checkpoint.
        needed: bytes of the whole checkpoint; 0 if unknown.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "a checkpoint cannot be written",
            where=str(folder),
            got=f"{error}{_room(folder, needed)}",
            remedy="make room and run the same command again: it resumes from the last checkpoint",
        ) from error


def _room(folder: Path, needed: int) -> str:
    """Return the room that is missing for a checkpoint, as far as its file system reports it."""
    if not needed:
        return ""
    try:
        free = shutil.disk_usage(folder.parent).free
        free += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except OSError:  # not there any more
        return ""
    if free >= needed:
        return f"; a checkpoint needs {size(needed)}"
    return f"; a checkpoint needs {size(needed)}, {size(needed - free)} more than there is room for"


def drop_checkpoints(root: Path) -> None:
    """Delete every checkpoint below `root` but the best ones; on one rank."""
    remove_unfinished(root)
    best, folders = best_checkpoints(root), checkpoint_folders(root)
    kept = [folder for folder in folders if folder.name in best]
    for folder in set(folders) - set(kept):
        shutil.rmtree(folder, ignore_errors=True)
    if kept:
        write_text(root / _LATEST, kept[0].name)
    else:
        (root / _LATEST).unlink(missing_ok=True)


def remove_unfinished(root: Path) -> None:
    """Remove what killed starts have left below `root`; on one rank, which no other start writes beside.

    A checkpoint that was moved aside, to be replaced by another one of its step, gets its name back.
    """
    for left in sorted(root.glob("*")):
        final = final_name(left)
        if not is_temporary(left) or (step_of(final.name) is None and final.name not in (_LATEST, BEST)):
            continue
        recover_folder(final)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _mark_best(root: Path, best: Sequence[str]) -> None:
    with disk_errors(root):
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
