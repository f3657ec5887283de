"""The growth of wandb's file of a run: wandb reports no full disk, its file only stops to grow."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

_SECONDS = 20.0
_PROBE_BYTES = 2**16


class FileGrowth:
    """Whether wandb's file of a run grows after rows are sent.

    Args:
        folder: of the file.
        seconds: in which a row that was sent has to be in the file.
    """

    def __init__(self, folder: Path, seconds: float = _SECONDS):
        self._folder, self._seconds = folder, seconds
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
        is_grown = self._size > before
        # A file that is closed may have grown before the disk was full.
        why = _error_of_writing(self._folder) if is_closed or not is_grown else None
        if is_grown and why is None:
            return None
        self._is_reported = True
        return f"wandb does not write to {self._folder}: {why or 'its file does not grow'}"

    def _bytes(self) -> int:
        with contextlib.suppress(OSError):
            return sum(file.stat().st_size for file in self._folder.glob("run-*.wandb"))
        return 0


def _error_of_writing(folder: Path) -> str | None:
    """Return the error of writing a small file to a folder; None if there is none."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None
