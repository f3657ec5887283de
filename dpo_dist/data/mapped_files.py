"""Files that are mapped into memory: whether another program has changed them since."""

import itertools
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from dpo_dist.errors import DataError

_AT_ONCE = 64  # a store may have thousands of shards, and a call to the file system of a cluster takes time

_State = tuple[int, int, int, int]


class MappedFiles:
    """Files as they are now. One that is deleted or replaced later stays readable where it is mapped.

    One that is changed in place is not: its new values are read, and beyond its new end the process is killed
    (SIGBUS). A new time alone is no change: programs of clusters touch files so that they do not count as
    unused, and some file systems round times later.

    Args:
        paths: the files.
        is_intact: reads a file whole and returns whether it has its content.
    """

    def __init__(self, paths: Iterable[Path], is_intact: Callable[[Path], bool]):
        self._is_intact = is_intact
        states = ((path, _state(path)) for path in paths)
        self._states = {path: state for path, state in states if state is not None}
        self._turns = itertools.cycle(self._states)

    def check(self) -> None:
        """Check the next 64 files: call it often.

        Raises:
            DataError: a file was changed in place.
        """
        for path in itertools.islice(self._turns, min(_AT_ONCE, len(self._states))):
            before, now = self._states[path], _state(path)
            if now is None or now[:2] != before[:2] or now == before:
                continue
            if now[2] != before[2] or not self._is_intact(path):
                raise DataError(
                    "a file was changed while the run reads it",
                    where=str(path),
                    got=f"{now[2]:,} bytes, written at {_time(now)}",
                    expected=f"{before[2]:,} bytes, written at {_time(before)}",
                    remedy="find the program that writes there; the same command checks all files again, "
                    "makes damaged ones again and continues from the last checkpoint",
                )
            self._states[path] = now


def _state(path: Path) -> _State | None:
    """Return device, inode, size and time of the last change of a file; None if it cannot be found."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _time(state: _State) -> str:
    return datetime.fromtimestamp(state[3] / 1e9).astimezone().isoformat(timespec="seconds")
