"""Files through which a batch script follows a run: exit codes of its processes, and what it has saved."""

import contextlib
import os
from pathlib import Path

PROGRESS = "DPO_DIST_PROGRESS"
"""Environment variable: a file to which a line is added whenever the run has saved something."""
EXIT_CODES = "DPO_DIST_EXIT_CODES"
"""Environment variable: a file to which each process adds its exit code; launchers replace it by theirs.

A process that ends because another one is lost adds none.
"""


def note_progress(saved: str) -> None:
    """Add a line to the file of what is saved, if there is one; a file that cannot be written is ignored."""
    _add(PROGRESS, saved)


def note_stop(reason: str) -> None:
    """Add that a person or the configuration has stopped the run: it is not to be started again by itself."""
    _add(PROGRESS, f"stopped by {reason}")


def note_exit_code(exit_code: int) -> None:
    """Add the exit code of this process to the file of them, if there is one."""
    _add(EXIT_CODES, str(int(exit_code)))


def _add(variable: str, line: str) -> None:
    if variable in os.environ:
        with contextlib.suppress(OSError), Path(os.environ[variable]).open("a") as file:
            file.write(f"{line}\n")
