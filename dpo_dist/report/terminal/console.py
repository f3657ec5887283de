"""Console of a run: progress and results on rank 0; the output of libraries is written to logs/rank-N.log."""

import contextlib
import faulthandler
import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from dpo_dist.atomic import open_in_place
from dpo_dist.config.console_schema import ConsoleConfig, ConsoleStyle
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.errors import DpoDistError
from dpo_dist.number_text import duration
from dpo_dist.report.terminal.progress import TrainingStatus, Work, describe_evaluation
from dpo_dist.report.terminal.screens import LineScreen, Screen, open_screen
from dpo_dist.safe_stream import SafeStream, output_descriptor, output_of_objects, printable_lines
from dpo_dist.secret_text import without_secrets

_FIRST_HEARTBEAT_SECONDS = 15.0
_HEARTBEAT_SECONDS = 60.0

Count = Callable[..., None]
"""Called with the number of units just done and, if it is known, the share of all work that is done."""


class Console:
    """Messages and progress on the screen, also written to the log; ranks other than 0 print only errors.

    Printing never raises.

    Args:
        screen: of rank 0; None on other ranks.
        errors: screen for errors; None: `screen`.
        seconds: shortest time between two lines about progress in the log.
    """

    def __init__(
        self, screen: Screen | None, errors: Screen | None = None, seconds: float = ConsoleConfig.seconds
    ):
        self._screen = screen
        self._errors = errors or screen
        self._log = LineScreen(logging.getLogger("dpo_dist").info, seconds)
        self._shown: list[Screen] = [self._log] if screen is None else [self._log, screen]
        self._due = [0.0] * len(self._shown)
        self._worked = -math.inf

    def say(self, text: str) -> None:
        """Print one line and log it; a warning starts with "warning: "."""
        for screen in self._shown:
            screen.message(text)

    def show(self, text: str) -> None:
        """Print one line without logging it: a log file may be readable by others."""
        if self._screen is not None:
            self._screen.message(text)

    def alarm(self, text: str) -> None:
        """Print and log an error, on any rank and from any thread."""
        logging.getLogger("dpo_dist").error(text)
        if self._errors is not None:
            self._errors.error(text)

    def result(self, kind: str, content: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Print and log a result: `content` is for programs, `lines` for people."""
        for screen in self._shown:
            screen.result(kind, content, lines)

    def row(self, row: Mapping[str, float], steps: int) -> None:
        """Show a metrics row of a run of so many steps; evaluations are always printed."""
        line = describe_evaluation(row, steps) if any(name.startswith("eval_") for name in row) else ""
        for screen in self._shown:
            screen.row(row, line)

    def is_due(self) -> bool:
        """Return whether it is time for `training`."""
        return time.monotonic() >= min(self._due)

    def training(self, status: TrainingStatus, *, always: bool = False) -> None:
        """Show the state of the training where it is due, or `always`."""
        now = time.monotonic()
        for number, screen in enumerate(self._shown):
            if always or now >= self._due[number]:
                self._due[number] = now + screen.line_seconds
                screen.training(status)

    def heartbeat(self, work: str) -> Callable[[float], None]:
        """Return a function that takes the seconds spent on `work` so far and prints them once a minute.

        It is silent beside progress that is shown.
        """
        due = _FIRST_HEARTBEAT_SECONDS

        def beat(seconds: float) -> None:
            nonlocal due
            if seconds >= due and time.monotonic() >= self._worked + _FIRST_HEARTBEAT_SECONDS:
                due = seconds + _HEARTBEAT_SECONDS
                self.say(f"{work}: {duration(seconds)} so far")

        return beat

    @contextlib.contextmanager
    def until_end(self) -> Iterator[None]:
        """End the progress on the screen when the block ends, in error or not."""
        try:
            yield
        finally:
            for screen in self._shown:
                screen.end_progress()

    @contextlib.contextmanager
    def progress(self, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Yield a function that takes the number of units done and their total, and shows them.

        A total of 0 shows nothing.
        """
        works: list[Work] = []

        def show(done: int, total: int) -> None:
            if total and self._screen is not None:
                works[:] = works or [Work(title, unit, time.monotonic())]
                work = works[0]
                work.done, work.total, work.share = done, total, done / total
                self._work(work)

        with self.until_end():
            yield show

    @contextlib.contextmanager
    def counter(self, title: str, unit: str) -> Iterator[Count]:
        """Yield a function that takes the number of units just done, and the share of all work that is done.

        The share is from 0 to 1, or None if the total is unknown. Nothing is shown if it is never called.
        """
        works: list[Work] = []

        def count(more: int, share: float | None = None) -> None:
            if self._screen is not None:
                works[:] = works or [Work(title, unit, time.monotonic())]
                work = works[0]
                work.done, work.share = work.done + more, share
                self._work(work)

        with self.until_end():
            yield count

    def _work(self, work: Work) -> None:
        self._worked = time.monotonic()
        for screen in self._shown:
            screen.work(work)


def console_on(stream: TextIO, settings: ConsoleConfig) -> Console:
    """Return a console that prints to `stream`, and JSON objects to standard output."""
    screen = open_screen(SafeStream(stream), SafeStream(output_of_objects()), settings)
    return Console(screen, seconds=settings.seconds)


def print_text(kind: str, text: str, settings: ConsoleConfig) -> None:
    """Print a text to standard output as it is, or as the field `text` of a JSON object."""
    if settings.style is ConsoleStyle.json:
        console_on(sys.stdout, settings).result(kind, {"text": text}, ())
    else:
        stream = SafeStream(sys.stdout)
        stream.write(text)
        stream.flush()


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    """Log nothing below an error in the block, and show no warnings of Python."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class _Once(logging.Filter):
    """Passes each distinct message once: some libraries repeat a warning at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


@contextlib.contextmanager
def open_console(folder: RunFolder, settings: ConsoleConfig | None = None) -> Iterator[Console]:
    """Redirect standard output and error of this process, including C libraries, to its log file.

    The yielded console prints to the screen. Enter it before heavy imports, to redirect their output too. On
    exit the streams are restored; an exception is also written to the log, if the disk is not full.
    """
    rank = os.environ.get("RANK", "0")
    log_file = folder.rank_log(rank)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    settings = settings or ConsoleConfig()
    objects, messages = (SafeStream.of_descriptor(number) for number in (output_descriptor(), 2))
    with open_in_place(log_file, "ab", buffering=0) as log:  # a buffer would raise again when it is closed
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        names_crashes = faulthandler.is_enabled()
        faulthandler.enable(2)  # a crash of native code, or of a mapped file that was cut, leaves its stack
        try:
            screen = open_screen(messages, objects, settings)
            console = Console(screen if rank == "0" else None, screen, settings.seconds)
            with _logging_to(sys.stderr), console.until_end():
                yield console
        except BaseException as error:
            block = error.block() + "\n" if isinstance(error, DpoDistError) else ""
            with contextlib.suppress(OSError):
                log.write(without_secrets(traceback.format_exc() + block).encode())
            raise
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)
            if not names_crashes:
                faulthandler.disable()
            messages.close()
            objects.close()


class _InertFormatter(logging.Formatter):
    """Records without secrets and control characters; further lines are indented and look like no record."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(without_secrets(super().format(record))).replace("\n", "\n  ")


@contextlib.contextmanager
def _logging_to(stream: TextIO) -> Iterator[None]:
    """Log to `stream`, warnings too, each of them once; on exit the caller's logging is restored."""
    root = logging.getLogger()
    callers = root.handlers[:], root.level
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_InertFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    callers_show = warnings.showwarning
    logging.captureWarnings(True)
    is_captured_by_caller = warnings.showwarning is callers_show
    once, warnings_logger = _Once(), logging.getLogger("py.warnings")
    warnings_logger.addFilter(once)
    try:
        yield
    finally:
        warnings_logger.removeFilter(once)
        if not is_captured_by_caller:
            logging.captureWarnings(False)
        root.handlers[:] = callers[0]
        root.setLevel(callers[1])
