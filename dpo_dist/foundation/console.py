"""A verb's console: rank 0 prints progress and results; output of libraries goes to logs/rank-N.log.

The log is written by `logging`, the screen is not: `logging.disable` and `dictConfig` of libraries and
scripts would silence it, and a reader that has gone would be a traceback for each line.
"""

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
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from dpo_dist.foundation.background import call_periodically
from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.foundation.files import for_json
from dpo_dist.foundation.streams import (
    SafeStream,
    json_stream,
    keep_document,
    kept_document,
    output_descriptor,
    printable_lines,
)
from dpo_dist.foundation.text import duration, percent, pluralize, without_secrets
from dpo_dist.foundation.types import Fields

LINE_SECONDS = 30.0  # between two progress lines
_REFRESH_SECONDS = 0.5
_FIRST_HEARTBEAT_SECONDS = 15.0
_HEARTBEAT_SECONDS = 60.0
_BAR_WIDTH = 20
_LEAST_BAR = 16
_STYLES = {"error": "bold red", "warning": "yellow", "verdict": "bold cyan"}  # of a line, by its first word
# In a scheduler's log file lines of these kinds begin with date and time; results do not.
_KINDS_WITH_TIME = ("message", "progress", "evaluation", "error")
_EVENTS = (*_KINDS_WITH_TIME, "step")
TRAINING = "training"  # the last progress line of this work stays on a terminal


class LineScreen:
    """Prints lines without control characters by `print_line`; progress at most once in `seconds`."""

    def __init__(
        self, print_line: Callable[[str], None], seconds: float = LINE_SECONDS, *, has_times: bool = False
    ):
        self.seconds = seconds
        self.due: float | None = None  # earliest time of the next progress line; None: now
        self._print = print_line
        self._has_times = has_times

    def print(self, kind: str, content: Fields, lines: Sequence[str]) -> None:  # noqa: ARG002
        """Print an event or a result: `content` is for programs, `lines` for people."""
        has_time = self._has_times and kind in _KINDS_WITH_TIME
        start = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}  " if has_time else ""
        for line in lines:
            self._print(printable_lines(start + line))

    def end_progress(self) -> None:
        """End the progress of training or other work."""
        self.due = None


class JsonScreen(LineScreen):
    """Prints one JSON object per line, with `kind` and `time`."""

    def print(self, kind: str, content: Fields, lines: Sequence[str]) -> None:  # noqa: ARG002
        """Print `content` as one JSON object."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self._print(json.dumps(for_json({"kind": kind, "time": now, **content}), default=str))


class DocumentScreen(LineScreen):
    """Prints events as lines; the last result becomes the one JSON document of the program."""

    def print(self, kind: str, content: Fields, lines: Sequence[str]) -> None:
        """Print an event, or keep a result."""
        if kind in _EVENTS:
            super().print(kind, content, lines)
        else:
            JsonScreen(keep_document).print(kind, content, lines)


class LiveScreen(LineScreen):
    """Prints messages above one live progress line on a terminal."""

    def __init__(self, terminal: RichConsole):
        super().__init__(terminal.print, _REFRESH_SECONDS)
        self._terminal = terminal
        self._text = Column(no_wrap=True, overflow="crop")
        self._live: RichProgress | None = None

    def print(self, kind: str, content: Fields, lines: Sequence[str]) -> None:
        """Show progress as the live line; the terminal wraps other lines, so that commands can be copied."""
        # The window may have been resized, and rich would ask a standard stream, which may be a file.
        with contextlib.suppress(OSError, ValueError):
            columns = os.get_terminal_size(self._terminal.file.fileno()).columns
            if columns:
                self._terminal.width = columns
        if kind == "progress":
            self._update(content, lines[0])
            return
        if kind == "error":  # else the live line would move below the error
            self.end_progress()
        level = {"message": content.get("level"), "error": "error"}.get(kind)
        for line in lines:
            # Lines of a result that begin with a level have its colour: the doctor's findings.
            style = _STYLES.get(level or line.partition(" ")[0].rstrip(":"), "")
            self._terminal.print(Text(printable_lines(line), style), soft_wrap=True)

    def _update(self, content: Fields, line: str) -> None:
        """Replace the live line; a narrow terminal cuts the end of its text."""
        share = content["share"]
        # Rich would shorten both columns by as much, and a line of 80 columns would have no bar.
        self._text.max_width = max(1, self._terminal.width - _LEAST_BAR - 1)
        if self._live is None:
            self._live = RichProgress(
                TextColumn("{task.description}", markup=False, table_column=self._text),
                BarColumn(None, table_column=Column(max_width=_BAR_WIDTH)),
                console=self._terminal,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
                transient=content["work"] != TRAINING,
            )
            self._live.add_task(line, total=None if share is None else 1, completed=share or 0)
            self._live.start()
        else:
            self._live.update(self._live.task_ids[0], description=line, completed=share or 0, refresh=True)

    def end_progress(self) -> None:
        """Leave the last state of training on the screen; remove the state of other work."""
        super().end_progress()
        live = self._live
        self._live = None
        if live is not None:
            live.stop()


class NotebookScreen(LineScreen):
    """Shows all lines, and below them the progress with a bar, in one output of a notebook's cell.

    A stream would be an output for each line, and its progress lines would stay.
    """

    def __init__(self) -> None:
        from IPython.display import display  # type: ignore[import-not-found]  # noqa: PLC0415

        super().__init__(self._add, _REFRESH_SECONDS)
        self._lines = list[str]()
        self._progress = ""
        self._stays = False
        self._output = display({"text/plain": ""}, raw=True, display_id=True)

    def print(self, kind: str, content: Fields, lines: Sequence[str]) -> None:
        """Add lines, or replace the progress."""
        if kind == "progress":
            filled = round(_BAR_WIDTH * (content["share"] or 0))
            bar = "" if content["share"] is None else "█" * filled + "░" * (_BAR_WIDTH - filled) + "  "
            self._progress = bar + printable_lines(lines[0])
            self._stays = content["work"] == TRAINING
            self._show()
        else:
            super().print(kind, content, lines)

    def end_progress(self) -> None:
        """Keep the last state of training; remove the state of other work."""
        super().end_progress()
        last = self._progress
        self._progress = ""
        if last and self._stays:
            self._lines.append(last)
        self._show()

    def _add(self, line: str) -> None:
        self._lines.append(without_secrets(line))
        self._show()

    def _show(self) -> None:
        self._output.update({"text/plain": "\n".join([*self._lines, self._progress])}, raw=True)


class Terminal(RichConsole):
    """A console of rich that never hides the cursor."""

    def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002
        """Do nothing: a killed process could not show the cursor again."""
        return False


def open_screen(messages: SafeStream, objects: SafeStream, style: str) -> LineScreen:
    """Return the screen for a `console.style`: text goes to `messages`, JSON goes to `objects`."""
    if kept_document() is not None:
        return DocumentScreen(messages.write_line, has_times=True)
    if style == "json":
        return JsonScreen(objects.write_line)
    if style == "auto" and is_notebook():
        return NotebookScreen()
    if style == "auto" and messages.isatty():
        terminal = Terminal(file=messages, highlight=False)  # type: ignore[arg-type]  # has the methods that rich calls
        if terminal.is_terminal and not terminal.is_dumb_terminal:
            return LiveScreen(terminal)
    return LineScreen(messages.write_line, has_times=True)


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook; a process that it has forked is none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    session = getattr(getattr(shell, "kernel", None), "session", None)
    return getattr(session, "pid", None) == os.getpid()


class Console:
    """Prints messages and progress to the screen and the log; ranks other than 0 print only errors.

    On those ranks `screen` is None, and `errors` is the screen for errors. Printing never raises.
    """

    def __init__(self, screen: LineScreen | None, errors: LineScreen | None = None):
        self._screen = screen
        self._errors = errors or screen
        log = LineScreen(logging.getLogger("dpo_dist").info)
        self._screens = [log] if screen is None else [log, screen]
        self._last_shown = -math.inf

    def say(self, text: str, level: Literal["info", "warning"] = "info") -> None:
        """Print one line and log it."""
        line = f"warning: {text}" if level == "warning" else text
        for screen in self._screens:
            screen.print("message", {"level": level, "text": text}, [line])

    def note(self, text: str) -> None:
        """Log one line without printing it: all is well, and nobody has to do anything."""
        self._screens[0].print("message", {"level": "info", "text": text}, [text])

    def warn(self, text: str) -> None:
        """Print and log a warning."""
        self.say(text, "warning")

    def show(self, text: str) -> None:
        """Print one line without logging it: a log file may be readable by others."""
        if self._screen is not None:
            self._screen.print("message", {"level": "info", "text": text}, [text])

    def alarm(self, text: str) -> None:
        """Print and log an error, on any rank and from any thread."""
        logging.getLogger("dpo_dist").error(text)
        if self._errors is not None:
            self._errors.print("error", {"message": text}, [text])

    def result(self, kind: str, content: Fields, lines: Sequence[str]) -> None:
        """Print and log a result: `content` is for programs, `lines` for people."""
        for screen in self._screens:
            screen.print(kind, content, lines)

    def is_due(self) -> bool:
        """Return whether `show_progress` would print now."""
        return time.monotonic() >= min(screen.due or 0.0 for screen in self._screens)

    def show_progress(self, content: Fields, line: str, *, always: bool = False) -> None:
        """Print a progress line if the last one is old enough, or `always`.

        `content`: `work`, `unit`, `done`, `total`, `share` (None: not known) and `seconds_left`.
        """
        now = time.monotonic()
        for screen in self._screens:
            if always or screen.due is None or now >= screen.due:
                screen.print("progress", content, [line])
                screen.due = now + screen.seconds

    @contextlib.contextmanager
    def heartbeat(self, work: str) -> Iterator[None]:
        """Print once a minute how long the block, `work`, has taken, unless progress is shown."""
        due = _FIRST_HEARTBEAT_SECONDS

        def beat(seconds: float) -> None:
            nonlocal due
            if seconds >= due and time.monotonic() >= self._last_shown + _FIRST_HEARTBEAT_SECONDS:
                due = seconds + _HEARTBEAT_SECONDS
                self.say(f"{work}: {duration(seconds)} so far")

        with call_periodically(beat):
            yield

    @contextlib.contextmanager
    def until_end(self) -> Iterator[None]:
        """End the progress on the screen when the block ends, in error or not."""
        try:
            yield
        finally:
            for screen in self._screens:
                screen.end_progress()

    @contextlib.contextmanager
    def progress(self, title: str, unit: str) -> Iterator[Callable[..., None]]:
        """Yield a function that shows progress, given the number of units done and, if known, the total.

        Nothing is shown if the total is 0. The rate counts from the first call: before it, processes start.
        """
        first: tuple[float, int] | None = None

        def show(done: int, total: int | None = None) -> None:
            nonlocal first
            if self._screen is not None and total != 0:
                self._last_shown = time.monotonic()
                if first is None:
                    first = (self._last_shown, done)
                    for screen in self._screens:  # what takes less needs no line
                        screen.due = self._last_shown + screen.seconds
                seconds = self._last_shown - first[0]
                new = done - first[1]
                share = done / total if total else None
                amount = pluralize(done, unit) if total is None else f"{done:,} of {pluralize(total, unit)}"
                parts = [f"{title}: {amount}"]
                if share is not None:
                    parts.append(percent(share))
                if new > seconds >= 1:
                    parts.append(f"{new / seconds:,.0f} a second")
                left = (total - done) * seconds / new if total and new and seconds >= 1 else None
                if left:
                    parts.append(f"{duration(left)} left")
                content = {"work": title, "unit": unit, "done": done, "total": total, "share": share}
                self.show_progress({**content, "seconds_left": left}, ", ".join(parts))

        with self.until_end():
            yield show


def console_on(stream: TextIO, style: str) -> Console:
    """Return a console that prints text to `stream`, or JSON objects to standard output."""
    return Console(open_screen(SafeStream(stream), SafeStream(json_stream()), style))


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    """Inside the block show no warnings of Python, and log only errors."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def open_console(rank_log: Callable[[str], Path], style: str = "auto") -> Iterator[Console]:
    """Redirect this process's standard output and error, also of C libraries, to the file `rank_log(rank)`.

    The yielded console still prints to the screen. Enter the context before heavy imports, to redirect their
    output too. Exit restores the streams, and writes an exception to the log if the disk is not full.
    """
    rank = os.environ.get("RANK", "0")
    log_file = rank_log(rank)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    before = sys.stdout, sys.stderr
    # Line buffering: else the lines of several processes would mix.
    streams = (os.fdopen(os.dup(number), "w", buffering=1) for number in (output_descriptor(), 2))
    objects, messages = map(SafeStream, streams)
    # Without a buffer, which would raise again on a full disk when it is closed.
    with log_file.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.enable(2)  # a crash in native code, or at a truncated mapped file, logs its stack
        if is_notebook():  # its streams have no descriptors; these stay open for handlers of libraries
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
            _move_handlers(before, (sys.stdout, sys.stderr))
        try:
            screen = open_screen(messages, objects, style)
            console = Console(screen if rank == "0" else None, screen)
            with _logging_to(sys.stderr), console.until_end():
                yield console
        except BaseException as error:
            block = error.block() + "\n" if isinstance(error, DpoDistError) else ""
            with contextlib.suppress(OSError):
                log.write(without_secrets(traceback.format_exc() + block).encode())
            raise
        finally:
            for number, stream in ((1, sys.stdout), (2, sys.stderr)):
                with contextlib.suppress(OSError):
                    stream.flush()
                os.dup2(saved[number - 1], number)
                os.close(saved[number - 1])
            _move_handlers((sys.stdout, sys.stderr), before)
            sys.stdout, sys.stderr = before
            messages.close()
            objects.close()


def _move_handlers(streams: tuple[TextIO, TextIO], others: tuple[TextIO, TextIO]) -> None:
    """Make the handlers of libraries that write to `streams` write to `others`."""
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            stream = vars(handler).get("stream")
            if stream in streams:
                handler.setStream(others[streams.index(stream)])


class _LogFormatter(logging.Formatter):
    """Removes secrets and control characters; indents further lines, so that none looks like a record."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(without_secrets(super().format(record))).replace("\n", "\n  ")


@contextlib.contextmanager
def _logging_to(stream: TextIO) -> Iterator[None]:
    """Log to `stream`, each warning once; restore the caller's logging on exit."""
    root = logging.getLogger()
    warned = logging.getLogger("py.warnings")
    logged = set[str]()
    former = (root.handlers[:], root.level)
    had_warnings = warnings.showwarning.__module__ == "logging"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_LogFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)

    def is_new(record: logging.LogRecord) -> bool:
        """Return whether a warning was not logged before: some libraries repeat one at every step."""
        message = record.getMessage()
        is_first = message not in logged
        logged.add(message)
        return is_first

    warned.addFilter(is_new)
    try:
        yield
    finally:
        warned.removeFilter(is_new)
        logging.captureWarnings(had_warnings)
        root.handlers[:] = former[0]
        root.setLevel(former[1])
