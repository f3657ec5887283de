"""The forms of a verb's output: lines, a live line on a terminal, JSON objects for programs."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from dpo_dist.config.console_schema import ConsoleConfig, ConsoleStyle
from dpo_dist.json_values import plain
from dpo_dist.report.terminal.progress import GAP, Part, TrainingStatus, Work, fitting
from dpo_dist.report.terminal.text_table import wrapped
from dpo_dist.safe_stream import SafeStream, printable_lines

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
        return JsonScreen(objects, settings.seconds)
    if settings.style is ConsoleStyle.auto and messages.isatty():
        terminal = Terminal(file=messages, highlight=False)  # type: ignore[arg-type]  # has all that is used
        if terminal.is_terminal and not terminal.is_dumb_terminal:
            return LiveScreen(terminal)

    def print_line(line: str) -> None:
        messages.write(line + "\n")
        messages.flush()

    def print_timed(line: str) -> None:
        print_line(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}  {line}")

    return LineScreen(print_timed, settings.seconds, print_line)
