"""Console of a run: progress and results on rank 0; the output of libraries is written to logs/rank-N.log."""

import contextlib
import faulthandler
import json
import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ConsoleConfig, ConsoleStyle
from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.foundation.files import open_in_place, plain
from dpo_dist.foundation.streams import SafeStream, output_descriptor, output_of_objects, printable_lines
from dpo_dist.foundation.text import counted, duration, percent, size, without_secrets
from dpo_dist.insight.tables import wrapped

GAP = "  "
"""Between the parts of a line."""

_EVALUATED: Mapping[str, Callable[[float], str]] = {
    "eval_loss": "loss {:.4f}".format,
    "eval_rewards/accuracies": "accuracy {:.3f}".format,
    "eval_rewards/margins": "margin {:.3f}".format,
    "eval_pairs_per_second": "{:,.1f} pairs/s".format,
    "eval_samples/length": "samples of {:,.0f} tokens".format,
    "eval_samples/finished": lambda share: f"{percent(share)} of them finished",
}


@dataclass(frozen=True)
class Part:
    """A part of a line; on a narrow screen, parts of the highest `rank` are omitted first."""

    text: str
    rank: int


@dataclass(frozen=True)
class TrainingStatus:
    """The state of the training after a step.

    Attributes:
        step: steps done.
        steps: of the whole run.
        values: metrics, as in a metrics row; absent ones are not shown.
        seconds_left: estimated; None if unknown.
    """

    step: int
    steps: int
    values: Mapping[str, float]
    seconds_left: float | None = None

    @property
    def share(self) -> float:
        """The share of the steps that are done."""
        return self.step / self.steps

    def parts(self) -> list[Part]:
        """Return the parts of the line."""
        shown: tuple[tuple[str, Callable[[float], str], int], ...] = (
            ("loss", "loss {:.4f}".format, 1),
            ("rewards/accuracies", "accuracy {:.2f}".format, 2),
            ("rewards/margins", "margin {:.3f}".format, 4),
            ("pairs_per_second", "{:,.1f} pairs/s".format, 5),
            ("mfu", lambda share: f"MFU {percent(share)}", 6),
        )
        values = self.values
        found = [Part(words(values[name]), rank) for name, words, rank in shown if name in values]
        if (peak := values.get("memory/peak_bytes")) is not None:
            found.append(Part(size(peak), 7))
        if self.seconds_left is not None and self.step < self.steps:
            found.append(Part(f"{duration(self.seconds_left)} left", 3))
        return [Part(f"step {self.step:,}/{self.steps:,}", 0), *found]


@dataclass
class Work:
    """Progress of work that is no training step.

    Attributes:
        title: "encoding train data".
        unit: singular of the units counted.
        started: `time.monotonic()` at the first count.
        done: units done.
        share: of all work that is done, from 0 to 1; None if unknown.
        total: units in all; None if unknown.
    """

    title: str
    unit: str
    started: float
    done: int = 0
    share: float | None = None
    total: int | None = None

    def parts(self) -> list[Part]:
        """Return the parts of the line."""
        seconds = time.monotonic() - self.started
        amount = counted(self.done, self.unit) if self.total is None else self._of_total(self.total)
        found = [Part(f"{self.title}: {amount}", 0)]
        if self.share is not None:
            found.append(Part(percent(self.share), 2))
        if self.done > seconds >= 1:
            found.append(Part(f"{self.done / seconds:,.0f} a second", 3))
        if self.share and self.share < 1 and seconds >= 1:
            found.append(Part(f"{duration(seconds / self.share - seconds)} left", 1))
        return found

    def _of_total(self, total: int) -> str:
        return f"{self.done:,} of {counted(total, self.unit)}"


def fitting(parts: list[Part], width: int) -> list[str]:
    """Return the texts of the parts that fit into `width` columns; the first part is always among them."""
    kept = sorted(parts, key=lambda part: part.rank)
    while len(kept) > 1 and len(GAP.join(part.text for part in kept)) > width:
        kept.pop()
    return [part.text for part in parts if part in kept]


def describe_evaluation(row: Mapping[str, float], steps: int) -> str:
    """Return the line about a metrics row of an evaluation: "step 100/1,000  evaluation: loss 0.6, ..."."""
    parts = [words(row[name]) for name, words in _EVALUATED.items() if name in row]
    return f"step {int(row['step']):,}/{steps:,}  evaluation: {', '.join(parts)}"


_LINE_SECONDS = 30.0
_REFRESH_SECONDS = 0.5
_FIRST_LINE_SECONDS = 5.0
_BAR_WIDTH = 24
_MIN_BAR_WIDTH = 8
WARNING = "warning: "


class Screen(Protocol):
    """One form of output. `line_seconds` is the shortest time between two calls of `training`."""

    line_seconds: float

    def message(self, text: str) -> None:
        """Print a message; a warning starts with `WARNING`."""

    def error(self, text: str) -> None:
        """Print an error, and no progress after it."""

    def training(self, status: TrainingStatus) -> None:
        """Show the state of the training."""

    def row(self, row: Mapping[str, float], line: str) -> None:
        """Show a metrics row; `line` has an evaluation in words, and is empty for a row of steps."""

    def work(self, work: Work) -> None:
        """Show the progress of other work; called often."""

    def result(self, kind: str, content: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Print a result: `content` is for programs, `lines` for people."""

    def end_progress(self) -> None:
        """End the progress of training or other work."""


class LineScreen:
    """Lines without control characters.

    Args:
        print_line: prints one line, given without its end.
        seconds: shortest time between two lines about progress.
        print_result: prints a line of a result; None: `print_line`.
    """

    def __init__(
        self,
        print_line: Callable[[str], None],
        seconds: float,
        print_result: Callable[[str], None] | None = None,
    ):
        self.line_seconds = seconds
        self._print = print_line
        self._print_result = print_result or print_line
        self._work_due: float | None = None

    def message(self, text: str) -> None:
        """Print a message."""
        self._print(printable_lines(text))

    def error(self, text: str) -> None:
        """Print an error."""
        self.message(text)

    def training(self, status: TrainingStatus) -> None:
        """Print the state of the training."""
        self.message(GAP.join(part.text for part in status.parts()))

    def row(self, row: Mapping[str, float], line: str) -> None:  # noqa: ARG002
        """Print an evaluation."""
        if line:
            self.message(line)

    def work(self, work: Work) -> None:
        """Print the progress after a few seconds, and then now and then."""
        if self._work_due is None:
            self._work_due = work.started + _FIRST_LINE_SECONDS
            self.message(f"{work.title} ...")
        elif time.monotonic() >= self._work_due:
            self._work_due = time.monotonic() + self.line_seconds
            self.message(", ".join(part.text for part in work.parts()))

    def result(self, kind: str, content: Mapping[str, Any], lines: Sequence[str]) -> None:  # noqa: ARG002
        """Print the lines."""
        for line in lines:
            self._print_result(printable_lines(line))

    def end_progress(self) -> None:
        """Start anew with the next work."""
        self._work_due = None


class JsonScreen:
    """A JSON object a line, each with `kind` and `time`.

    Args:
        stream: to print to.
        seconds: shortest time between two objects about progress.
    """

    def __init__(self, stream: SafeStream, seconds: float):
        self.line_seconds = seconds
        self._stream = stream
        self._work_due = 0.0

    def message(self, text: str) -> None:
        """Print a message."""
        is_warning = text.startswith(WARNING)
        level = "warning" if is_warning else "info"
        self._print("message", {"level": level, "text": text.removeprefix(WARNING)})

    def error(self, text: str) -> None:
        """Print an error."""
        self._print("error", {"message": text})

    def training(self, status: TrainingStatus) -> None:
        """Print steps done and time left."""
        left = {"seconds_left": status.seconds_left}
        self._progress(Work("training", "step", 0.0, status.step, status.share, status.steps), left)

    def row(self, row: Mapping[str, float], line: str) -> None:
        """Print all metrics."""
        self._print("evaluation" if line else "step", row)

    def work(self, work: Work) -> None:
        """Print the progress now and then."""
        if time.monotonic() >= self._work_due:
            self._work_due = time.monotonic() + self.line_seconds
            self._progress(work, {})

    def result(self, kind: str, content: Mapping[str, Any], lines: Sequence[str]) -> None:  # noqa: ARG002
        """Print the content."""
        self._print(kind, content)

    def end_progress(self) -> None:
        """Start anew with the next work."""
        self._work_due = 0.0

    def _progress(self, work: Work, more: Mapping[str, Any]) -> None:
        done = {"work": work.title, "done": work.done, "total": work.total, "unit": work.unit}
        self._print("progress", {**done, "share": work.share, **more})

    def _print(self, kind: str, content: Mapping[str, Any]) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self._stream.write(json.dumps(plain({"kind": kind, "time": now, **content}), default=str) + "\n")
        self._stream.flush()


class LiveScreen(LineScreen):
    """Messages above one live line on a terminal; without a step or work, there is no live line."""

    def __init__(self, terminal: RichConsole):
        super().__init__(self._print_above, _REFRESH_SECONDS, self._print_wrapped)
        self._terminal = terminal
        self._live: Live | None = None

    def error(self, text: str) -> None:
        """Print an error, below the last state of the live line."""
        self.end_progress()
        self.message(text)

    def training(self, status: TrainingStatus) -> None:
        """Replace the live line."""
        self._show(_LiveLine(status.parts(), status.share), stays=True)

    def work(self, work: Work) -> None:
        """Replace the live line."""
        if self._work_due is None or time.monotonic() >= self._work_due:
            self._work_due = time.monotonic() + _REFRESH_SECONDS
            self._show(_LiveLine(work.parts(), work.share), stays=False)

    def end_progress(self) -> None:
        """Leave the last state of the training on the screen; remove that of other work."""
        super().end_progress()
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _print_above(self, line: str) -> None:
        style = "yellow" if line.startswith(WARNING) else ""
        self._terminal.print(Text(line, style), soft_wrap=True)

    def _print_wrapped(self, line: str) -> None:
        # Messages have commands to copy: the terminal wraps them without a line end.
        for part in wrapped(line, self._terminal.width - 1):
            self._print_above(part)

    def _show(self, line: "_LiveLine", *, stays: bool) -> None:
        if self._live is None:
            self._live = Live(
                line,
                console=self._terminal,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
                transient=not stays,
            )
            self._live.start()
        self._live.update(line, refresh=True)


class _LiveLine:
    """One line within the width of the terminal, with a bar if there is room for it."""

    def __init__(self, parts: list[Part], share: float | None):
        self._parts = parts
        self._share = share

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        # Some terminals wrap a line that has all their columns.
        width = max(options.max_width - 1, 1)
        text = GAP.join(fitting(self._parts, width))
        room = min(width - len(text) - 2, _BAR_WIDTH)
        if self._share is None or room < _MIN_BAR_WIDTH:
            yield Text(text, no_wrap=True, overflow="crop", end="")
            return
        yield Text(text + "  ", end="")
        yield ProgressBar(total=1.0, completed=self._share, width=room)


class Terminal(RichConsole):
    """rich's console on the terminal of its stream, whatever the standard streams of this process are."""

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines, read again each time: windows are resized."""
        with contextlib.suppress(OSError, ValueError):
            columns, lines = os.get_terminal_size(self.file.fileno())
            if columns:
                return ConsoleDimensions(columns, lines or 25)
        return super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002
        """Leave the cursor visible: a killed process could not show it again."""
        return False


def open_screen(messages: SafeStream, objects: SafeStream, settings: ConsoleConfig) -> Screen:
    """Return the screen that `settings` asks for.

    Args:
        messages: for people: a terminal, a file or a pipe.
        objects: for programs.
        settings: the section `console`.
    """
    if settings.style is ConsoleStyle.json:
        return JsonScreen(objects, _LINE_SECONDS)
    if settings.style is ConsoleStyle.auto and messages.isatty():
        terminal = Terminal(file=messages, highlight=False)  # type: ignore[arg-type]  # has all that is used
        if terminal.is_terminal and not terminal.is_dumb_terminal:
            return LiveScreen(terminal)

    def print_line(line: str) -> None:
        messages.write(line + "\n")
        messages.flush()

    def print_timed(line: str) -> None:
        print_line(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}  {line}")

    return LineScreen(print_timed, _LINE_SECONDS, print_line)


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

    def __init__(self, screen: Screen | None, errors: Screen | None = None, seconds: float = _LINE_SECONDS):
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
    return Console(screen)


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
            console = Console(screen if rank == "0" else None, screen)
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
