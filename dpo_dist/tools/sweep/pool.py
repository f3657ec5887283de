"""Train the points of a sweep, some at a time, each in a process with its own output file and GPUs."""

import contextlib
import gc
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from dpo_dist.config.schema import ConsoleStyle
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError, ErrorPrinter, ExitCode, RunOutcome, exit_after
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.signals import LAUNCHER_VARIABLE, StopRequest, end_at_signals, stop_signals
from dpo_dist.foundation.streams import output_descriptor
from dpo_dist.foundation.text import duration, pluralize
from dpo_dist.kit import RunConfig, RunFolder, RunHistory, checked_console, write_command
from dpo_dist.tools.sweep.extension import SweepConfig
from dpo_dist.tools.sweep.folder import SweepFolder
from dpo_dist.tools.sweep.points import Points

Words = tuple[str, ...]
_PROGRESS_SECONDS = 60.0
_WATCH_SECONDS = 2.0
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


class _Process(NamedTuple):
    """The process of a point, which writes to `screen` from the byte `start` on."""

    words: Words
    process: Any
    gpus: list[str]
    began: float  # by `time.monotonic`
    screen: Path
    start: int

    def printed(self) -> str:
        """Return what the point has printed."""
        return screen_since(self.screen, self.start)


class Pool:
    """Trains points, some at a time, each in a process of its own, so that a crash ends one point only.

    Each process is a fork of this one, which has imported everything; with a launcher, the fork execs it.
    """

    def __init__(self, points: Points, folder: SweepFolder, console: Console, settings: SweepConfig) -> None:
        import torch  # noqa: PLC0415  (imported by now)

        self.points = points
        self._folder = folder
        self._console = console
        self.codes = dict[Words, int]()
        self.ends = dict[Words, tuple[str, str]]()
        self._count = settings.trials or len(points)
        self._running = dict[Any, _Process]()  # by a descriptor that is ready when the process has ended
        self._received: list[int] = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        count = torch.cuda.device_count()
        gpus = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
        parallel = settings.parallel or count or 1
        if count % parallel:
            raise ConfigError(
                "the GPUs cannot be divided among the points",
                where="sweep.parallel",
                got=f"{parallel}, with {pluralize(count, 'GPU')}",
                remedy=f"set it to a divisor of {count}",
            )
        self._free = [gpus[place::parallel] for place in range(parallel)]
        self._launcher = settings.launcher
        python = shlex.quote(sys.executable)
        if self._launcher is None and count > parallel:
            self._launcher = f"{python} -m dpo_dist launch"
        elif self._launcher is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._launcher = python  # CUDA does not work in a fork of a process that has used it

    def run(self, waiting: Iterator[Words]) -> bool:
        """Train these points and fill `codes` and `ends`; return whether a signal stopped the sweep.

        The next point is asked for when GPUs are free for it.
        """
        before = {number: signal.signal(number, self._pass_on) for number in stop_signals()}
        has_more = True
        due = time.monotonic() + _PROGRESS_SECONDS
        while (has_more and not self._received) or self._running:
            while self._free and not self._received:
                words = next(waiting, None)
                if words is None:
                    break
                self._start(words)
            has_more = not self._free
            for descriptor in wait(list(self._running), _WATCH_SECONDS) if self._running else ():
                self._end(descriptor)
            for running in self._running.values():
                if self.is_hopeless(running.words):
                    os.killpg(running.process.pid, signal.SIGTERM)
                if time.monotonic() > due:
                    self._console.say(f"{' '.join(running.words)}: {_last_line(running.printed())}")
            due += _PROGRESS_SECONDS if time.monotonic() > due else 0.0
        for number, handler in before.items():
            signal.signal(number, handler)
        for words in self.ends:
            if is_finished(self.points[words]):
                self.codes[words] = ExitCode.completed
                self.ends[words] = (_ending(ExitCode.completed), "")
        return bool(self._received)

    def is_hopeless(self, words: Words) -> bool:  # noqa: ARG002
        """Return whether a running point is to be stopped now; a grid trains every point to its end."""
        return False

    def ended(self, words: Words) -> None:
        """Report a point that has ended to the search, which may change how it ended; a grid has none."""

    def _end(self, descriptor: Any) -> None:
        """Record how a process and its point ended, and free its GPUs."""
        os.close(descriptor)
        point = self._running.pop(descriptor)
        words = point.words
        point.process.join()
        self._free.append(point.gpus)
        run = RunFolder(self.points[words].run.path)
        self.codes[words], self.ends[words] = point_end(run, point.process.exitcode, point.printed())
        self.ended(words)
        outcome, _ = self.ends[words]
        self._console.say(f"{' '.join(words)}: {outcome} after {duration(time.monotonic() - point.began)}")

    def _start(self, words: Words) -> None:
        config = self.points[words].with_sections(SweepConfig())
        gpus = self._free.pop(0)
        screen = self._folder.point_screen(RunFolder(config.run.path))
        work: Callable[[], int] = partial(_train_point, config)
        if self._launcher is not None:
            work = partial(
                _exec_command, write_command("train", config, screen.with_suffix(""), self._launcher)
            )
        place = f"point {list(self.points).index(words) + 1} of {self._count}"
        self._console.say(f"{' '.join(words)}: {place}, its screen is in {screen}")
        fork = multiprocessing.get_context("fork")
        errors = ErrorPrinter(config.console.style is ConsoleStyle.json, is_document=False)
        process: Any = fork.Process(target=_run_point, args=(work, errors, screen, gpus))
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        start = screen.stat().st_size if screen.exists() else 0
        process.start()
        with contextlib.suppress(OSError):  # the point has already done it
            os.setpgid(process.pid, process.pid)
        # Not `process.sentinel`: a launcher, which replaces the fork, closes it at once.
        descriptor = os.pidfd_open(process.pid)
        self._running[descriptor] = _Process(words, process, gpus, time.monotonic(), screen, start)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        for running in self._running.values():
            with contextlib.suppress(ProcessLookupError):  # the point has just ended
                os.killpg(running.process.pid, number)


def _run_point(work: Callable[[], int], errors: ErrorPrinter, screen: Path, gpus: Sequence[str]) -> None:
    """Do a point's work and exit with its code; write what it prints to the file `screen`."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # else Ctrl-C would reach the point twice, directly and from the sweep
    file = os.open(screen, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for descriptor in {1, 2, output_descriptor()}:
        os.dup2(file, descriptor)
    os.environ[LAUNCHER_VARIABLE] = str(os.getppid())
    end_at_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
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
