"""File with the stacks of all threads of this process, for runs that hang."""

import contextlib
import faulthandler
import os
import socket
import threading
from datetime import datetime
from pathlib import Path

from dpo_dist.atomic import open_in_place


class StackFile:
    """Adds stacks to a file; thread-safe, and a file that cannot be written is ignored.

    Args:
        path: of the file; None: nothing is written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._written = ""
        self._writing = threading.Lock()

    def write(self, reason: str) -> None:
        """Add the stacks of all threads, once for each reason."""
        with self._writing:
            if self.path is None or self._written == reason:
                return
            self._written = reason
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            with contextlib.suppress(OSError), open_in_place(self.path, "a") as file:
                file.write(f"{now} process {os.getpid()} on {socket.gethostname()}: {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
