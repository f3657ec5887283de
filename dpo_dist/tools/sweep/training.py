"""Train the points of a sweep one after another, each in a process with its own output file."""

import contextlib
import gc
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from dpo_dist.config.schema import ConsoleStyle
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError, ErrorPrinter, ExitCode, RunOutcome, exit_after
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.signals import LAUNCHER_VARIABLE, StopRequest, end_at_signals, stop_signals
from dpo_dist.foundation.streams import output_descriptor
from dpo_dist.foundation.text import duration
from dpo_dist.kit import RunConfig, RunFolder, RunHistory, checked_console, write_command
from dpo_dist.tools.sweep.extension import SweepConfig
from dpo_dist.tools.sweep.folder import SweepFolder
from dpo_dist.tools.sweep.points import Points

Words = tuple[str, ...]
_PROGRESS_SECONDS = 60.0
ELSEWHERE = "trained by another process"
"""The outcome of a point whose run another process has locked."""


def is_finished(config: RunConfig) -> bool:
    """Return whether a point's run is completed with these settings."""
    state = RunHistory(RunFolder(config.run.path)).state()
    if state is None or state.outcome is not RunOutcome.completed:
        return False
    return state.identity.get("run_digest") == config.identity.digest


def warm_up() -> None:
    """Import and initialise libraries once, before the points are forked."""
    # Counting GPUs must not initialise CUDA here: forks of this process could not use it then.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import pyarrow  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    import dpo_dist.tools.report.recorder  # noqa: PLC0415
    import dpo_dist.training.run  # noqa: F401, PLC0415
    from dpo_dist.model.library_internals import fill_conversions  # noqa: PLC0415

    pyarrow.array([0])  # imports pandas
    fill_conversions()
    Figure().savefig(BytesIO())
    gc.freeze()  # else garbage collection in each fork would copy the memory of all modules


def _ending(code: int) -> str:
    """Return an exit code in a word or two: completed, diverged, invalid, signal 9, exit code 127."""
    if code in set(ExitCode):
        return ExitCode(code).name
    if 0 < code < 128:
        return f"exit code {code}"
    return f"signal {-code if code < 0 else code - 128}"


def point_end(run: RunFolder, code: int, printed: str) -> tuple[int, tuple[str, str]]:
    """Return the exit code, outcome and error of a point whose process ended with `code`.

    If a point failed and another process holds its run's lock, that process trains it: the code is 75.
    """
    if code in (ExitCode.invalid, ExitCode.failed) and run.lock.is_file():
        try:
            with locked(run.lock, ""):
                pass
        except ConfigError:
            return ExitCode.preempted, (ELSEWHERE, "")
    error = "" if code in (ExitCode.completed, ExitCode.preempted) else _last_line(printed)
    return code, (_ending(code), error)


def screen_since(screen: Path, start: int) -> str:
    """Return the text in a point's output file from the byte `start` on."""
    return screen.read_bytes()[start:].decode(errors="replace")


def _last_line(printed: str) -> str:
    """Return the last line that a point printed, or the first line of its error."""
    lines = reversed(printed.splitlines())
    return next((line[:160] for line in lines if line.strip() and line[0] != " "), "")


class PointTrainer:
    """Trains points one after another, each in a process of its own, so that a crash ends one point only.

    Each process is a fork of this one, which has imported everything; with a launcher, the fork execs it.
    `codes` and `ends` have the exit code, and the outcome and error, of each point that was trained.
    """

    def __init__(self, points: Points, folder: SweepFolder, console: Console, launcher: str | None) -> None:
        import torch  # noqa: PLC0415  (imported by now)

        self.points = points
        self.codes = dict[Words, int]()
        self.ends = dict[Words, tuple[str, str]]()
        self._folder = folder
        self._console = console
        self._launcher = launcher
        self._process: Any = None  # of the point in training
        self._received: list[int] = []
        python = shlex.quote(sys.executable)
        if launcher is None and torch.cuda.device_count() > 1:
            self._launcher = f"{python} -m dpo_dist launch"
        elif launcher is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._launcher = python  # CUDA does not work in a fork of a process that has used it

    def run(self, waiting: Sequence[Words]) -> bool:
        """Train these points; return whether a signal stopped the sweep."""
        before = {number: signal.signal(number, self._pass_on) for number in stop_signals()}
        for words in waiting:
            if not self._received:
                self._train(words)
        for number, handler in before.items():
            signal.signal(number, handler)
        # Another process may have finished a point that it had when this one came to it.
        for words in self.ends:
            if is_finished(self.points[words]):
                self.codes[words] = ExitCode.completed
                self.ends[words] = (_ending(ExitCode.completed), "")
        return bool(self._received)

    def _train(self, words: Words) -> None:
        name = " ".join(words)
        config = self.points[words].with_sections(SweepConfig())
        run = RunFolder(config.run.path)
        screen = self._folder.point_screen(run)
        work: Callable[[], int] = partial(_train_point, config)
        if self._launcher is not None:
            command = write_command("train", config, screen.with_suffix(""), self._launcher)
            work = partial(_exec_command, command)
        number = list(self.points).index(words) + 1
        self._console.say(f"{name}: point {number} of {len(self.points)}, its screen is in {screen}")
        errors = ErrorPrinter(config.console.style is ConsoleStyle.json, is_document=False)
        process: Any = multiprocessing.get_context("fork").Process(
            target=_run_point, args=(work, errors, screen)
        )
        start = screen.stat().st_size if screen.exists() else 0
        began = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        process.start()
        with contextlib.suppress(OSError):  # the point has already done it
            os.setpgid(process.pid, process.pid)
        self._process = process
        if self._received:  # since the last point ended
            os.killpg(process.pid, self._received[0])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
        # Not `process.sentinel`: a launcher, which replaces the fork, closes it at once.
        descriptor = os.pidfd_open(process.pid)
        while not wait([descriptor], _PROGRESS_SECONDS):
            self._console.say(f"{name}: {_last_line(screen_since(screen, start))}")
        os.close(descriptor)
        self._process = None
        process.join()
        code = process.exitcode
        self.codes[words], self.ends[words] = point_end(run, code, screen_since(screen, start))
        outcome, _ = self.ends[words]
        self._console.say(f"{name}: {outcome} after {duration(time.monotonic() - began)}")

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # the point has just ended
                os.killpg(self._process.pid, number)


def _run_point(work: Callable[[], int], errors: ErrorPrinter, screen: Path) -> None:
    """Do a point's work and exit with its code; write what it prints to the file `screen`."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # else Ctrl-C would reach the point twice, directly and from the sweep
    file = os.open(screen, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for descriptor in {1, 2, output_descriptor()}:
        os.dup2(file, descriptor)
    os.environ[LAUNCHER_VARIABLE] = str(os.getppid())
    end_at_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    exit_after(work, errors)


def _train_point(config: RunConfig) -> int:
    """Train as the verb `train` does, in this process; return the exit code."""
    stop = StopRequest(config.trainer.stop_after_steps, config.trainer.max_seconds)
    with stop.listening(), checked_console(config, trains=True) as console:
        from dpo_dist.kit import train  # noqa: PLC0415  (slow)
        from dpo_dist.tools.report.recorder import reporting  # noqa: PLC0415  (slow)

        return train(config, console, stop, reporting())


def _exec_command(command: str) -> int:
    """Replace this process by a command."""
    words = shlex.split(command)
    os.execvp(words[0], words)  # noqa: S606  (the user's own launcher)
