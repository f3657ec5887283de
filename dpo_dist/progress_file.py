"""Files through which a program that has started a run follows it: what is saved, and the exit codes.

Only one process writes to a file: on a network file system, lines that several nodes append may overwrite
each other.
"""

import contextlib
import os
from pathlib import Path

from dpo_dist.errors import ExitCode

PROGRESS = "DPO_DIST_PROGRESS"
"""Environment variable: a file to which rank 0 adds a line whenever it has saved something."""
EXIT_CODES = "DPO_DIST_EXIT_CODES"
"""Environment variable: path, to which each process adds its rank, of a file with its exit code.

For launchers that replace exit codes by their own.
"""


def note_progress(saved: str) -> None:
    """Add a line to the file of what is saved, if there is one; a file that cannot be written is ignored."""
    if PROGRESS in os.environ and _rank() == "0":
        with contextlib.suppress(OSError), Path(os.environ[PROGRESS]).open("a") as file:
            file.write(f"{saved}\n")


def note_stop(reason: str) -> None:
    """Add that a person or the configuration has stopped the run: it is not to be started again by itself."""
    note_progress(f"stopped by {reason}")


def note_exit_code(exit_code: int) -> None:
    """Write the exit code of this process to its file, if a path is given; none if another one is lost."""
    if EXIT_CODES in os.environ and exit_code != ExitCode.lost:
        with contextlib.suppress(OSError):
            Path(f"{os.environ[EXIT_CODES]}.{_rank()}").write_text(f"{int(exit_code)}\n")


def exit_codes(path: Path) -> list[int]:
    """Return the exit codes that the processes have written for a path; each file is removed."""
    found = []
    for file in path.parent.glob(f"{path.name}.*"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(file.read_text()))
        file.unlink(missing_ok=True)
    return found


def _rank() -> str:
    return os.environ.get("RANK", "0")
