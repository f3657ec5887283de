"""The user's command `run.after_checkpoint`, which copies or examines checkpoints behind the training."""

import contextlib
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.process import outside_of_launch
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import without_secrets

_STOP_SECONDS = 20.0  # in which a run that was asked to stop waits for the command: most jobs get 30
_KILL_SECONDS = 5.0  # between SIGTERM and SIGKILL
_POLL_SECONDS = 0.2
_LAST_BYTES = 4096
_LAST_CHARACTERS = 200


class AfterCheckpoint:
    """Runs a shell command for the checkpoints of the run in `folder`, in a thread of rank 0.

    Checkpoints that come while the command runs wait; of several, the newest alone gets a command. A failure
    is a warning. `_lock` guards what the thread shares with the saver.

    Checkpoints that are there when the command begins stay until it ends (`in_use`), so that a copy of the
    whole run misses no file.
    """

    def __init__(self, command: str, folder: RunFolder, console: Console):
        self._command = command
        self._folder = folder
        self._console = console
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._in_use: Collection[Path] = ()
        self._next: Path | None = None
        self._must_end = threading.Event()

    def start(self, checkpoint: Path, end_deleting: Callable[[], object]) -> None:
        """Run the command for a committed checkpoint: now, or after the one that is running.

        `end_deleting` waits until older checkpoints are deleted; the thread calls it.
        """
        with self._lock:
            self._next = checkpoint
            if self._thread is None:
                work = partial(self._work, end_deleting)
                self._thread = threading.Thread(target=work, name="after_checkpoint", daemon=True)
                self._thread.start()

    def in_use(self) -> Collection[Path]:
        """Return the checkpoints that a running command may read."""
        with self._lock:
            return self._in_use

    def finish(self, is_stopping: Callable[[], bool]) -> None:
        """Wait for the command of the newest checkpoint; of a run that stops, end it after a while."""
        thread = self._thread
        if thread is None:
            return
        end = math.inf
        with self._console.heartbeat("waiting for run.after_checkpoint"):
            while thread.is_alive():
                thread.join(_POLL_SECONDS)
                if is_stopping():
                    end = min(end, time.monotonic() + _STOP_SECONDS)
                if time.monotonic() > end:
                    self._must_end.set()

    def _work(self, end_deleting: Callable[[], object]) -> None:
        while True:
            end_deleting()
            with self._lock:
                checkpoint = self._next
                self._next = None
                if checkpoint is None:
                    self._in_use = ()
                    self._thread = None
                    return
                self._in_use = checkpoint_folders(self._folder.checkpoints)
            try:
                fault = self._run(checkpoint)
            except (OSError, ValueError) as error:  # no memory for a process, a NUL in the command
                fault = str(error)
            if fault:
                self._console.warn(f"run.after_checkpoint failed for {checkpoint.name}: {fault}")

    def _run(self, checkpoint: Path) -> str:
        """Run the command to its end; return what went wrong, "" for nothing."""
        if self._must_end.is_set():
            return "the run was asked to stop"
        names = {"DPO_DIST_CHECKPOINT": checkpoint, "DPO_DIST_RUN_DIR": self._folder.path}
        variables = outside_of_launch(os.environ) | {
            name: str(path.absolute()) for name, path in names.items()
        }
        # A file, not a pipe: a pipe would stay open as long as a process that the command leaves behind.
        with tempfile.TemporaryFile() as output:
            # In a session of its own: Ctrl-C would end a copy that the run still waits for.
            process = subprocess.Popen(  # noqa: S602  (the user's own command)
                self._command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
            while process.poll() is None and not self._must_end.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
            is_ended = process.returncode is None
            if is_ended:
                _end(process)
            if process.returncode == 0:
                return ""
            begin = max(0, output.seek(0, os.SEEK_END) - _LAST_BYTES)
            output.seek(begin)
            lines = output.read().decode(errors="replace").splitlines()
            if begin:  # a cut line may have half of a secret, which is not recognized
                del lines[0]
        status = f"exit status {process.returncode}"
        if process.returncode < 0:
            status = signal.Signals(-process.returncode).name
        if is_ended:
            status = f"still running {_STOP_SECONDS:g} s after the request to stop, and ended"
        said = [line.strip() for line in lines if line.strip()]
        shown = (printable(without_secrets(line)[:_LAST_CHARACTERS]) for line in said[-1:])
        return ": ".join([status, *shown])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command with the processes that it has started."""
    for number, seconds in ((signal.SIGTERM, _KILL_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return
