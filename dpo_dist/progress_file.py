"""A file that grows whenever a run has saved something: a batch script sees in it whether a start got on."""

import contextlib
import os
from pathlib import Path

PROGRESS = "DPO_DIST_PROGRESS"
"""Environment variable with the path of the file."""


def note_progress(saved: str) -> None:
    """Add a line to the file, if there is one; a file that cannot be written is ignored."""
    if PROGRESS in os.environ:
        with contextlib.suppress(OSError), Path(os.environ[PROGRESS]).open("a") as file:
            file.write(f"{saved}\n")
