"""Screens: a live line that fits the terminal, JSON objects, and streams that fail."""

import errno
import io
import json
import os
import pty
import select
import struct
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from dpo_dist.config.schema import ConsoleConfig, ConsoleStyle
from dpo_dist.foundation.streams import SafeStream
from dpo_dist.insight.console import (
    Console,
    JsonScreen,
    LineScreen,
    LiveScreen,
    Screen,
    Terminal,
    TrainingStatus,
    Work,
    fitting,
    open_screen,
)
from dpo_dist.insight.tables import wrapped

VALUES = {
    "loss": 0.51234,
    "rewards/accuracies": 0.78,
    "rewards/margins": 0.4123,
    "pairs_per_second": 1234.5,
    "mfu": 0.41,
    "memory/peak_bytes": 61.2 * 2**30,
}
STATUS = TrainingStatus(120, 1000, VALUES, seconds_left=7200.0)


def rendered(width: int, encoding: str = "utf-8") -> str:
    """The live line in a terminal of this width, without control codes."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    terminal = Terminal(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with terminal.capture() as captured:
        screen = LiveScreen(terminal)
        screen.training(STATUS)
        screen.end_progress()
    return captured.get().split("\x1b[2K")[-1].rstrip("\n")


def test_a_wide_line_shows_everything() -> None:
    line = rendered(140)
    assert line.startswith(
        "step 120/1,000  loss 0.5123  accuracy 0.78  margin 0.412  1,234.5 pairs/s  MFU 41 %  61.2 GiB"
        "  2 h 00 min left  "
    )
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in line


@pytest.mark.parametrize("width", [1, 20, 60, 79, 80, 100, 110, 200])
def test_the_line_fits_the_terminal(width: int) -> None:
    line = rendered(width)
    assert len(line) < max(width, 2)
    assert "\n" not in line
    if width >= 60:
        assert "loss 0.5123  accuracy 0.78" in line
        assert "2 h 00 min left" in line


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert rendered(140, "ascii").isascii()


def test_the_first_part_is_always_kept() -> None:
    assert fitting(STATUS.parts(), 3) == ["step 120/1,000"]


def test_work_in_words() -> None:
    work = Work("encoding", "record", 0.0, done=1, total=2000, share=0.0005)
    assert work.parts()[0].text == "encoding: 1 of 2,000 records"


def objects(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_one_object_a_line() -> None:
    stream = io.StringIO()
    console = Console(JsonScreen(SafeStream(stream), 30.0))
    console.say("reading\nthe data")
    console.say("warning: a file is missing")
    console.row({"step": 1, "loss": float("nan"), "grad_norm": 2.5}, 10)
    console.row({"step": 1, "eval_loss": 0.5}, 10)
    console.training(STATUS, always=True)
    with console.progress("scoring", "pair") as show:
        show(1, 4)
    console.result("summary", {"steps": 10}, ["10 steps"])
    console.alarm("process lost: rank 1 died")
    found = objects(stream.getvalue())
    assert all("time" in each for each in found)
    assert [each["kind"] for each in found] == [
        "message",
        "message",
        "step",
        "evaluation",
        "progress",
        "progress",
        "summary",
        "error",
    ]
    assert found[0]["text"] == "reading\nthe data"
    assert (found[1]["level"], found[1]["text"]) == ("warning", "a file is missing")
    assert (found[2]["loss"], found[2]["grad_norm"]) == (None, 2.5)
    assert (found[5]["done"], found[5]["total"]) == (1, 4)


class FullDisk(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


@pytest.mark.parametrize("style", list(ConsoleStyle))
@pytest.mark.parametrize("make", [FullDisk, closed_pipe])
def test_a_stream_that_fails_never_raises(make: type[io.StringIO], style: ConsoleStyle) -> None:
    stream = SafeStream(make())
    console = Console(open_screen(stream, stream, ConsoleConfig(style)))
    for _ in range(3):
        console.say("reading")
        console.training(STATUS, always=True)
        console.row({"step": 1, "eval_loss": 0.5}, 10)
        console.alarm("an error")
    stream.close()


def test_characters_that_a_stream_lacks_are_escaped() -> None:
    binary = io.BytesIO()
    text = io.TextIOWrapper(binary, encoding="ascii", write_through=True)
    SafeStream(text).write("na\xefve\n")
    assert binary.getvalue() == b"na\\xefve\n"


def test_results_are_broken_between_words() -> None:
    line = "time       1 min 00 s of training, 3,840 pairs, peak memory 0.9 GiB"
    assert wrapped(line, 40) == [
        "time       1 min 00 s of training, 3,840",
        " " * 11 + "pairs, peak memory 0.9 GiB",
    ]
    assert wrapped("verdict: training loss 0.671 -> 0.64 in 8 steps", 32) == [
        "verdict: training loss 0.671 ->",
        "    0.64 in 8 steps",
    ]
    path = "/a/long-path/" + 30 * "x"
    assert wrapped(f"model      {path}", 20)[-1].strip() == path
    assert wrapped("", 20) == [""]


@pytest.mark.usefixtures("terminal_name")
def test_a_terminal_breaks_results_and_leaves_messages_whole() -> None:
    terminal = OnTerminal(30)
    terminal.screen.result("summary", {}, ["verdict: no fault found: accuracy 1.00"])
    assert "verdict: no fault found:\r\n    accuracy 1.00" in terminal.shown()
    terminal.screen.message("to upload it: wandb sync output/wandb/offline-run")
    assert "wandb sync output/wandb/offline-run" in terminal.shown()


def test_plain_lines_have_no_control_characters() -> None:
    printed: list[str] = []
    LineScreen(printed.append, 30.0).message("a\x1b[31mb\rc\td\ne")
    assert printed == ["a\\x1b[31mb\\rc\\td\ne"]


class OnTerminal:
    """A live screen on a pseudo-terminal."""

    def __init__(self, columns: int):
        self.master, self.slave = pty.openpty()
        self.resize(columns)
        stream = SafeStream.of_descriptor(self.slave)
        self.screen: Screen = open_screen(stream, stream, ConsoleConfig())

    def resize(self, columns: int) -> None:
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def shown(self) -> str:
        text = b""
        while select.select([self.master], [], [], 0.05)[0]:
            text += os.read(self.master, 100_000)
        return text.decode()


@pytest.fixture
def terminal_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.usefixtures("terminal_name")
def test_the_live_line_on_a_terminal() -> None:
    """It is replaced in place, follows the width, stays below messages, and leaves the cursor visible."""
    terminal = OnTerminal(60)
    screen = terminal.screen
    assert isinstance(screen, LiveScreen)
    screen.training(STATUS)
    assert "MFU" not in terminal.shown(), "60 columns"
    terminal.resize(150)
    screen.training(STATUS)
    shown = terminal.shown()
    assert shown.startswith("\r\x1b[2K")
    assert "MFU 41 %" in shown
    assert "\n" not in shown
    screen.message("a message")
    shown = terminal.shown()
    assert shown.startswith("\r\x1b[2Ka message\r\n")
    assert "step 120/1,000" in shown, "drawn again below the message"
    screen.error("an error")
    shown = terminal.shown()
    assert shown.endswith("an error\r\n")
    screen.message("after it")
    assert terminal.shown() == "after it\r\n"
    assert "\x1b[?25l" not in shown


@pytest.mark.usefixtures("terminal_name")
def test_the_line_of_other_work_disappears_when_it_ends() -> None:
    terminal = OnTerminal(100)
    with Console(terminal.screen).counter("encoding train data", "record") as count:
        count(64, 0.5)
    shown = terminal.shown()
    assert "encoding train data: 64 records" in shown
    assert shown.endswith("\x1b[2K")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    assert type(OnTerminal(80).screen) is LineScreen


def test_no_live_line_without_a_terminal_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with (tmp_path / "slurm.out").open("w") as file:
        assert type(open_screen(SafeStream(file), SafeStream(sys.stdout), ConsoleConfig())) is LineScreen
