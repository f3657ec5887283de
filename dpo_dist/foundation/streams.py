"""Standard streams without secrets and control codes; closed, full or unread ones never end a run."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import TextIO

from dpo_dist.foundation.text import without_secrets

_reserved: TextIO | None = None
"""Standard output, once `reserve_output` keeps it for JSON; None: it is not kept, or not yet."""
_document: str | None = None
"""The JSON document for the end of the program; "": there is none yet; None: this process prints none."""


class SafeStream:
    """Writes to `stream` until a write fails, with escapes for characters that its encoding lacks."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.is_open = True
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text` without secrets; do nothing after a write has failed."""
        self._try(lambda: _write(self._stream, text))
        return len(text)

    def write_line(self, line: str) -> None:
        """Write a line and flush it."""
        self.write(f"{line}\n")  # one write: two would mix the lines of two threads
        self.flush()

    def flush(self) -> None:
        """Flush the stream if that is possible."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        if self.is_open:
            try:
                call()
            except (OSError, ValueError):  # closed pipe, full disk, lost terminal; closed stream
                self.is_open = False

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self.is_open and self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._stream.fileno()

    def close(self) -> None:
        """Close the stream; text that cannot be written is lost."""
        self.is_open = False
        with contextlib.suppress(OSError, ValueError):
            self._stream.close()


def printable(text: str) -> str:
    """Return `text` as one line for a terminal, with escapes in place of control and invisible characters."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )


def printable_lines(text: str) -> str:
    """Return `text` with escapes in place of control characters, except line ends."""
    return "\n".join(map(printable, text.split("\n")))


def print_line(text: str, to: TextIO | None = None) -> None:
    """Print a line without control characters to a standard stream; a full or closed one is no error."""
    to = to or sys.stdout
    stream = SafeStream(to)
    stream.write_line(printable_lines(text))
    if not stream.is_open:
        _discard(to)


def print_result(text: str) -> None:
    """Print the only result of a command, without secrets; a reader that has gone (`| head`) is no error."""
    if _document is not None:
        keep_document(json.dumps({"kind": "text", "text": text}))
        return
    try:
        _write(sys.stdout, text)
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def open_closed_streams() -> None:
    """Open the null device for closed standard streams (`>&-`), before another file gets their descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor: this one
            os.set_inheritable(descriptor, True)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def reserve_output() -> None:
    """Keep standard output for JSON objects; output of libraries and children goes to standard error."""
    global _reserved  # noqa: PLW0603 (as standard output itself, one for the process)
    with contextlib.suppress(OSError, ValueError):  # replaced by a stream without a descriptor
        if _reserved is None and sys.stdout.fileno() == 1:
            _reserved = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
            os.dup2(2, 1)


def json_stream() -> TextIO:
    """Return the stream for JSON objects."""
    return _reserved or sys.stdout


def keep_document(text: str | None) -> None:
    """Keep the JSON document that the program prints at its end; "": none yet; None: it prints none."""
    global _document  # noqa: PLW0603 (one for the process)
    _document = text


def kept_document() -> str | None:
    """Return the last argument of `keep_document`."""
    return _document


def awaits_document() -> bool:
    """Return whether a program with `--json` has still to print a JSON document."""
    will_print = _document is not None
    has_begun = _reserved is not None
    # `exit_after` begins by reserving output; later on, another process may be the one that prints.
    return will_print or not has_begun


def output_descriptor() -> int:
    """Return the file descriptor of `json_stream`."""
    return 1 if _reserved is None else _reserved.fileno()


def _write(stream: TextIO, text: str) -> None:
    """Write `text` without secrets, and with escapes for characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(without_secrets(text).encode(encoding, "backslashreplace").decode(encoding))


def _discard(stream: TextIO) -> None:
    """Discard a stream's buffer: at exit Python would write it again, fail and return 120."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
