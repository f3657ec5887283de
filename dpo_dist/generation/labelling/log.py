"""Log of a labelling session: every event is on disk before it is acknowledged."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dpo_dist.atomic import sync
from dpo_dist.errors import DataError
from dpo_dist.generation.labelling.events import Event, as_line, from_line
from dpo_dist.generation.lock import locked


class LabelLog:
    """An open log; `events` are those that it had when it was opened."""

    def __init__(self, descriptor: int, events: list[Event]):
        self._descriptor = descriptor
        self.events = events

    def append(self, event: Event) -> None:
        """Write an event and flush it to disk, or raise OSError and change nothing."""
        line = (json.dumps(as_line(event), ensure_ascii=False) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise


@contextlib.contextmanager
def opened_log(path: Path) -> Iterator[LabelLog]:
    """Open or create a log, locked against a second server until the context ends.

    A last line without its end, as a kill during a write may leave it, is removed: it was never acknowledged.

    Raises:
        ConfigError: another process has the log open.
        DataError: a line is damaged.
    """
    remedy = "open the address that it printed, also for a second annotator; or set another run.dir"
    with locked(path, "serves this labelling session", remedy) as descriptor:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        events = [_event(line, path, number) for number, line in enumerate(whole.splitlines(), start=1)]
        os.ftruncate(descriptor, len(whole))
        sync(path.parent)
        yield LabelLog(descriptor, events)


def _event(line: bytes, path: Path, number: int) -> Event:
    try:
        return from_line(json.loads(line))
    except (KeyError, ValueError, TypeError):
        raise DataError(
            "a line of the labelling log is damaged",
            where=f"{path}:{number}",
            expected="the lines as the labelling page wrote them",
            remedy="restore the file from a copy, or delete this line; the other judgements stay",
        ) from None
