"""Read files that describe others: whoever wrote them, a huge or endless one takes no memory."""

import errno
import os
import stat
from pathlib import Path

_MOST_BYTES = 2**30
"""More than the metrics of a million steps, or the manifest of a source with a million files."""


def read_small(file: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """Return the content of a file.

    Args:
        file: any path.
        most_bytes: a whole number of MiB.

    Raises:
        OSError: it cannot be read, is larger than `most_bytes`, or is a device or a pipe.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a pipe, opening could wait
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is a device or a pipe", str(file))
        if status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {most_bytes >> 20:,} MiB", str(file))
        return stream.read()
