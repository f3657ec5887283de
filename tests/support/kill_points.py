"""Kill -9 of processes at a chosen file operation, which a clock does not decide."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHANGES = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_REACHED = "reached"


@dataclass(frozen=True)
class KillPoint:
    """The file operation of a rank at which processes are killed.

    Attributes:
        folder: operations below it are counted.
        operation: the number of the fatal one; 0: none, they are only counted.
        rank: of the process whose operations are counted.
        delay: seconds between the operation and the kill; 0: the operation itself does not happen.
        everybody: all ranks are killed, not only this one.
    """

    folder: Path
    operation: int = 0
    rank: int = 0
    delay: float = 0.0
    everybody: bool = False

    def forget_former_start(self) -> None:
        """Remove what a former start in the folder has left; call it before each."""
        for file in (*self.folder.glob("process-*"), self.folder / _REACHED):
            file.unlink(missing_ok=True)

    @property
    def is_reached(self) -> bool:
        """Whether the fatal operation of the last start was reached."""
        return (self.folder / _REACHED).exists()

    def arm(self) -> None:
        """Count in this process from now on."""
        rank = int(os.environ.get("RANK", "0"))
        (self.folder / f"process-{rank}").write_text(str(os.getpid()))
        fatal = self.operation if rank == self.rank else 0
        sys.addaudithook(_counter(self.folder, rank, fatal, self._fall))

    def counted(self, rank: int) -> int:
        """Return the operations of this rank in the last start."""
        return int((self.folder / f"operations-{rank}").read_text())

    def _fall(self) -> None:
        (self.folder / _REACHED).touch()
        if self.delay:
            threading.Thread(target=self._kill, daemon=True).start()
        else:
            self._kill()

    def _kill(self) -> None:
        time.sleep(self.delay)
        if self.everybody:
            for file in self.folder.glob("process-*"):
                if file.name != f"process-{self.rank}":
                    with contextlib.suppress(ProcessLookupError):  # it has ended
                        os.kill(int(file.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _counter(
    folder: Path, rank: int, fatal: int, fall: Callable[[], None]
) -> Callable[[str, tuple[Any, ...]], None]:
    record = os.open(folder / f"operations-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    beginning = f"{folder}{os.sep}"
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if _changes(event, arguments, beginning):
            count += 1
            os.pwrite(record, str(count).encode(), 0)
            if count == fatal:
                fall()

    return hook


def _changes(event: str, arguments: tuple[Any, ...], beginning: str) -> bool:
    writes = event in _CHANGES or (event == "open" and bool(arguments[2] & _WRITING))
    return writes and not isinstance(arguments[0], int) and os.fsdecode(arguments[0]).startswith(beginning)
