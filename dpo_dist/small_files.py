"""Read files that describe others: whoever wrote them, a huge one takes no memory."""

import errno
import os
from pathlib import Path

_MOST_BYTES = 2**30
"""More than the metrics of a million steps, or the manifest of a source with a million files."""


def read_small(file: Path) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it cannot be read, or has more than 1 GiB.
    """
    with file.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size > _MOST_BYTES:
            raise OSError(errno.EFBIG, "it is larger than 1 GiB", str(file))
        return stream.read()
