"""Lock a folder or a session against a second process on the same files."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dpo_dist.errors import ConfigError


@contextlib.contextmanager
def locked(path: Path, owner: str, remedy: str) -> Iterator[int]:
    """Open or create a file for appending and lock it until the context ends; yield its descriptor.

    On a file system without locks, a second process is not noticed.

    Args:
        path: of the file.
        owner: the other process, as the subject of the error.
        remedy: of the error.

    Raises:
        ConfigError: another process has locked it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process {owner}", where=str(path), remedy=remedy) from None
        except OSError:
            pass
        yield descriptor
    finally:
        os.close(descriptor)
