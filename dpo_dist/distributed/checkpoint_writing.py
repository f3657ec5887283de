"""Write this rank's files of a checkpoint in the background, from copies or from the tensors themselves."""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.checkpoint_folders import STATE
from dpo_dist.distributed.checkpoint_manifest import Entries, describe_files, write_part
from dpo_dist.distributed.host_copy import HostCopy
from dpo_dist.distributed.random_states import random_states, random_states_name
from dpo_dist.distributed.slice_files import write_slices
from dpo_dist.distributed.slices import ModelSlices
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError
from dpo_dist.number_text import size


@dataclass(frozen=True)
class RankFiles:
    """The content of this rank's files of a checkpoint.

    Attributes:
        models: the slices; copies, if training changes the tensors before they are written.
        texts: of the small files, by name.
    """

    models: Sequence[ModelSlices]
    texts: dict[str, str]

    @classmethod
    def of(cls, models: Sequence[ModelSlices], state: dict[str, Any], world: World) -> "RankFiles":
        """Return them for the loop's state and the random states of this moment."""
        texts = {random_states_name(world.rank): random_states(world.device)}
        if world.is_main:
            texts[STATE] = json.dumps({**state, "world_size": world.size}, indent=1)
        return cls(models, texts)

    @property
    def bytes(self) -> int:
        """Return the size of the files."""
        tensors = [part for model in self.models for own in model.slices for part in own.parts.values()]
        return sum(tensor.nbytes for tensor in tensors) + sum(map(len, self.texts.values()))


class Writing:
    """A checkpoint that is not committed yet, as one rank writes it.

    Args:
        temporary: the folder that is written.
        folder: its final name.
        needed: bytes of the whole checkpoint, for errors.
        rank: of this process.
    """

    def __init__(self, temporary: Path, folder: Path, needed: int, rank: int):
        self.temporary, self.folder, self._rank = temporary, folder, rank
        self._needed = needed
        self._is_wanted = True
        self._written: list[Path] = []
        self._entries: Future[Entries] = Future()

    def write(self, files: RankFiles, staging: HostCopy | None = None) -> None:
        """Write the files of this rank, which are not flushed to disk yet.

        Args:
            files: of this rank.
            staging: memory through which tensors of a GPU are written.

        Raises:
            CheckpointError: they cannot be written.
        """
        with disk_errors(self.temporary, self._needed):
            for model in files.models:
                self._written += write_slices(
                    model, self.temporary, self._rank, staging, lambda: self._is_wanted
                )
            for name, text in files.texts.items():
                self._written.append(self.temporary / name)
                self._written[-1].write_text(text)

    def finish_behind(self, write: Callable[[], None]) -> None:
        """Call `write`, then flush and digest the files, in a thread that does not keep the process alive."""

        def work() -> None:
            try:
                write()
                with disk_errors(self.temporary, self._needed):
                    entries = describe_files(self._wanted_files(), self.temporary)
                    if self._is_wanted:
                        write_part(self.temporary, self._rank, entries)
                self._entries.set_result(entries)
            except BaseException as error:  # raised by `entries`, in the main thread
                self._entries.set_exception(error)

        threading.Thread(target=work, name="checkpoint", daemon=True).start()

    def _wanted_files(self) -> Iterator[Path]:
        for file in self._written:
            if self._is_wanted:
                yield file

    def entries(self) -> Entries:
        """Wait until the files are on disk, and return their sizes and digests.

        Raises:
            CheckpointError: they cannot be written.
        """
        return self._entries.result()

    def is_whole(self, seconds: float) -> bool:
        """Return whether the files are on disk; wait for it, at most so long."""
        done, _ = wait([self._entries], seconds)
        return bool(done) and not self.has_failed

    @property
    def is_done(self) -> bool:
        """Return whether the files are on disk, or cannot be written."""
        return self._entries.done()

    @property
    def has_failed(self) -> bool:
        """Return whether the files cannot be written."""
        return self._entries.done() and self._entries.exception() is not None

    def give_up(self) -> None:
        """End the writing before its next file; another rank has failed, or this one must end."""
        self._is_wanted = False

    def remove(self) -> None:
        """Remove the files of all ranks; the checkpoint must not be committed any more."""
        self.give_up()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def disk_errors(self) -> contextlib.AbstractContextManager[None]:
        """Raise a `CheckpointError` for an `OSError` inside the block."""
        return disk_errors(self.temporary, self._needed)


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
