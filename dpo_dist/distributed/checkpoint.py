"""Save checkpoints that are complete or absent (law L4).

All ranks write a checkpoint under a temporary name; a manifest lists its files with sizes and digests. Then
the folder is renamed, `latest` and `best` are updated, and after that older checkpoints are deleted. Only
files that match a manifest are loaded. Training continues while copies of the weights are written in the
background.
"""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_dist.atomic import (
    commit_folder,
    final_name,
    is_temporary,
    recover_folder,
    temporary_name,
    write_text,
)
from dpo_dist.config.checkpoint_folders import (
    BEST,
    best_checkpoints,
    checkpoint_folders,
    checkpoint_name,
    step_of,
)
from dpo_dist.distributed.checkpoint_loading import written_entries
from dpo_dist.distributed.checkpoint_manifest import Entries, has_all_files, remove_parts, write_manifest
from dpo_dist.distributed.checkpoint_writing import RankFiles, Writing, disk_errors
from dpo_dist.distributed.host_copy import HostCopy
from dpo_dist.distributed.slices import ModelSlices, Sharded
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError
from dpo_dist.progress_file import note_progress

log = logging.getLogger(__name__)

_LATEST = "latest"
_LAST_SECONDS = 30.0


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
        self._pending: Writing | None = None
        self._best: list[str] = []
        # Open, so that no other directory gets its inode.
        self._run_directory = os.open(root.parent, os.O_RDONLY) if world.is_main else None

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
        temporary = Path(world.on_main(lambda: self._create(temporary_name(folder))))
        files = RankFiles.of([part.shards() for part in self._parts], state, world)
        writing = Writing(temporary, folder, sum(world.gather(files.bytes)), world.rank)
        if not is_last and self._can_copy(files.models):
            files = replace(files, models=self._copy.of(files.models))
            writing.finish_behind(lambda: writing.write(files))
        else:
            with self._removed_on_error(writing):
                world.together(lambda: writing.write(files, self._copy))
            self._copy.close()  # host memory is short, or training ends
            writing.finish_behind(lambda: None)
        self._pending = writing

    def _create(self, folder: Path) -> str:
        """Create `folder` and return it; first remove unfinished checkpoints beside it, to make room."""
        assert self._run_directory is not None
        with disk_errors(folder):
            now, at_start = self._root.parent.stat(), os.fstat(self._run_directory)
            if not os.path.samestat(now, at_start):
                raise OSError(errno.ENOENT, "the run directory was replaced while the run trains")
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
    def votes(self) -> tuple[bool, bool]:
        """Return whether this rank's files of a pending checkpoint are on disk, and whether they failed.

        For `must_commit`; not collective.
        """
        pending = self._pending
        return pending is not None and pending.is_done, pending is not None and pending.has_failed

    def must_commit(self, votes: Sequence[int]) -> bool:
        """Return whether to call `commit` now: all ranks are done, or one has failed; not collective.

        Args:
            votes: sums of `votes` over all ranks, the same on each.
        """
        done, failed = votes
        if failed and self._pending is not None:
            self._pending.give_up()
        return bool(failed) or done == self._world.size

    def commit(self) -> None:
        """Wait for the pending checkpoint, if any, and make it the latest; collective.

        Raises:
            CheckpointError: the disk is full or failed; checkpoints committed before are unchanged.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._removed_on_error(pending):
            mine = self._world.together(pending.entries)
            entries = {name: entry for part in self._world.gather(mine) for name, entry in part.items()}
            self._world.on_main(lambda: self._commit(pending, entries))
        self._damaged.discard(pending.folder.name)
        kept = self._best
        self._world.on_main(lambda: _mark_best(self._root, kept))
        # Some file systems need minutes to delete files of terabytes.
        self._world.on_main(lambda: _delete_old(pending.folder, self._keep_last, self._damaged, kept))

    def _commit(self, writing: Writing, entries: Entries) -> None:
        with writing.disk_errors():
            _commit(writing.temporary, writing.folder, entries)
            self._committed(step_of(writing.folder.name) or 0)

    def resume(self, folder: Path, best_steps: Iterable[int]) -> None:
        """Complete what a kill may have cut after the commit of the checkpoint that is resumed; collective.

        Args:
            folder: of the checkpoint.
            best_steps: steps of the best checkpoints, the best first.

        Raises:
            CheckpointError: `latest` or `best` cannot be written.
        """
        best = [checkpoint_name(step) for step in best_steps]
        self._world.on_main(lambda: _mark_latest(folder))
        self._world.on_main(lambda: _mark_best(self._root, best))
        if not self._damaged:  # deleted after the next commit, as are the others then
            self._world.on_main(lambda: _delete_old(folder, self._keep_last, set(), best))

    @contextlib.contextmanager
    def _removed_on_error(self, writing: Writing) -> Iterator[None]:
        """Remove a checkpoint that cannot be committed, after the error that all ranks raise."""
        try:
            yield
        except CheckpointError:
            if self._world.is_main:
                writing.remove()
            raise

    def close(self) -> None:
        """End the saver; not collective.

        After an error, a checkpoint of which this rank's files are on disk soon is left to the next start,
        which commits it if those of all ranks are (`complete_unfinished`). Otherwise it is dropped.
        """
        pending, self._pending = self._pending, None
        if pending is not None and not pending.is_whole(_LAST_SECONDS):
            log.warning("%s was not written yet: it is dropped", pending.folder)
            pending.remove()
        self._copy.close()
        if self._run_directory is not None:
            os.close(self._run_directory)
            self._run_directory = None


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


def complete_unfinished(root: Path) -> None:
    """Commit checkpoints below `root` that all ranks had written when their start ended; on one rank.

    Only those that are newer than the complete ones. Digests are verified when one is loaded.

    Raises:
        CheckpointError: one cannot be committed, such as on a full disk; it stays for the next start.
    """
    complete = filter(has_all_files, checkpoint_folders(root))
    newest = max((step_of(folder.name) or 0 for folder in complete), default=0)
    for left in sorted(root.glob("*")):
        final = final_name(left)
        is_newer = is_temporary(left) and (step_of(final.name) or 0) > newest
        if is_newer and (entries := written_entries(left)):  # others: `remove_unfinished`
            with disk_errors(left):
                _commit(left, final, entries)


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


def _commit(temporary: Path, folder: Path, entries: Entries) -> None:
    write_manifest(temporary, entries)
    commit_folder(temporary, folder)
    remove_parts(folder)
    _mark_latest(folder)
    note_progress(str(folder))


def _mark_latest(folder: Path) -> None:
    with disk_errors(folder):
        write_text(folder.parent / _LATEST, folder.name)


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
