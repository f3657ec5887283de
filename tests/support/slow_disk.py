"""A disk that keeps the background writing of a checkpoint waiting."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

from dpo_dist.distributed import checkpoint
from dpo_dist.distributed.checkpoint import FileEntry


@contextlib.contextmanager
def slow_disk() -> Iterator[threading.Event]:
    """Nothing is written before the event is set, which the end of the block does too."""
    moves, write = threading.Event(), checkpoint.write_slices

    def wait_and_write(*arguments: Any) -> dict[str, FileEntry]:
        assert moves.wait(60)
        return write(*arguments)

    with mock.patch.object(checkpoint, "write_slices", wait_and_write):
        try:
            yield moves
        finally:
            moves.set()
