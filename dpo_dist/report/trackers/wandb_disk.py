"""The growth of wandb's file of a run: wandb reports no full disk, its file only stops to grow."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

_SECONDS = 20.0
_PROBE_BYTES = 2**16


class FileGrowth:
    """Whether a file grows after rows are sent.

    Args:
        file: wandb's file of the run.
        seconds: in which a row that was sent has to be in the file.
    """

    def __init__(self, file: Path, seconds: float = _SECONDS):
        self._file, self._seconds = file, seconds
        self._size = self._bytes()
        self._sent_at: float | None = None
        self._is_reported = False

    def note_sent(self) -> None:
        """Remember that something was sent now."""
        if self._sent_at is None:
            self._sent_at = time.monotonic()

    def fault(self, *, is_closed: bool = False) -> str | None:
        """Return that the file has stopped to grow, and why, if it has; only once.

        Args:
            is_closed: wandb has closed the file, so that all that was sent has to be in it.
        """
        waited = None if self._sent_at is None else time.monotonic() - self._sent_at
        if self._is_reported or waited is None or (waited < self._seconds and not is_closed):
            return None
        before, self._size, self._sent_at = self._size, self._bytes(), None
        if self._size > before:
            return None
        self._is_reported = True
        return f"wandb does not write to {self._file.parent}: {_why(self._file.parent)}"

    def _bytes(self) -> int:
        with contextlib.suppress(OSError):
            return self._file.stat().st_size
        return 0


def _why(folder: Path) -> str:
    """Return the error of writing to a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return "its file does not grow"
