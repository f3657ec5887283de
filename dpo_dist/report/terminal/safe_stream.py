"""A text stream whose writes never raise: a closed pipe or a full disk must not end a run."""

import contextlib
import os
import sys
from typing import TextIO


class SafeStream:
    """Writes to `stream` until that fails once; then it writes nothing.

    Characters that the stream's encoding lacks are written as escapes.

    Attributes:
        is_open: whether no write has failed yet.
        encoding: of the stream.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.is_open = True
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    @classmethod
    def of_descriptor(cls, descriptor: int) -> "SafeStream":
        """Return a stream on a copy of a file descriptor."""
        # A line at a time: lines of several processes do not mix.
        return cls(os.fdopen(os.dup(descriptor), "w", buffering=1))

    def write(self, text: str) -> int:
        """Write `text` if the stream takes it."""
        if self.is_open:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError):  # closed pipe, full disk, lost terminal; closed stream
                self.is_open = False
        return len(text)

    def flush(self) -> None:
        """Flush the stream if that is possible."""
        if self.is_open:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self.is_open = False

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self.is_open and self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor.

        Raises:
            OSError: it has none.
        """
        return self._stream.fileno()

    def close(self) -> None:
        """Close the stream; text that cannot be written is lost."""
        self.is_open = False
        with contextlib.suppress(OSError, ValueError):
            self._stream.close()


def print_line(text: str) -> None:
    """Print a line to standard output; a reader that has gone away (`| head`) is no error."""
    stream = SafeStream(sys.stdout)
    stream.write(text + "\n")
    stream.flush()
    if not stream.is_open:  # Python would flush what is left at its end, fail and exit with 120
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
