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
from dpo_dist.insight.console import Console, LineScreen, LiveScreen, Terminal, TrainingStatus, open_screen

VALUES = {
    "loss": 0.51234,
    "rewards/accuracies": 0.78,
    "rewards/margins": 0.4123,
    "pairs_per_second": 1234.5,
    "mfu": 0.41,
    "memory/peak_bytes": 61.2 * 2**30,
}
STATUS = TrainingStatus(120, 1000, VALUES, seconds_left=7200.0)
LINE = (
    "step 120/1,000  loss 0.5123  accuracy 0.780  2 h 00 min left  margin 0.412  1,234.5 pairs/s  MFU 41 %"
    "  61.2 GiB"
)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [1, 20, 60, 80, 110, 140])
def test_the_live_line_fits_the_terminal_and_has_a_bar_if_there_is_room(width: int, encoding: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    terminal = Terminal(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with terminal.capture() as captured:
        screen = LiveScreen(terminal)
        screen.progress(STATUS)
        screen.end_progress()
    line = captured.get().split("\x1b[2K")[-1].rstrip("\n")
    assert len(line) < max(width, 2)
    text = line.rstrip(" -\N{BOX DRAWINGS HEAVY HORIZONTAL}\N{BOX DRAWINGS HEAVY LEFT}")
    if width >= 20:
        assert LINE.startswith(text)
        assert text.count("  ") >= (width >= 80) * 3, "whole parts, the important first"
    assert (text != line.rstrip()) == (width - len(text) >= 11), "a bar"
    assert encoding == "utf-8" or line.isascii()


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ConsoleConfig(style=ConsoleStyle.json)
    console = Console(open_screen(SafeStream(sys.stderr), SafeStream(sys.stdout), settings))
    console.say("reading\nthe data")
    console.say("warning: a file is missing")
    console.row({"step": 1, "loss": float("nan"), "grad_norm": 2.5}, 10)
    console.row({"step": 1, "eval_loss": 0.5}, 10)
    with console.until_end():
        console.training(STATUS, always=True)
    with console.progress("scoring", "pair") as show:
        show(1, 4)
    console.result("summary", {"steps": 10}, ["10 steps"])
    console.alarm("process lost: rank 1 died")
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert printed.err == ""
    assert all("time" in each for each in found)
    kinds = "message message step evaluation progress progress summary error"
    assert [each["kind"] for each in found] == kinds.split()
    assert found[0]["text"] == "reading\nthe data"
    assert (found[1]["level"], found[1]["text"]) == ("warning", "a file is missing")
    assert (found[2]["loss"], found[2]["grad_norm"]) == (None, 2.5)
    assert (found[4]["work"], found[4]["done"], found[4]["seconds_left"]) == ("training", 120, 7200.0)
    assert (found[5]["done"], found[5]["total"], found[5]["share"]) == (1, 4, 0.25)


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
    console = Console(open_screen(stream, stream, ConsoleConfig(style=style)))
    for _ in range(2):
        console.say("text")
        console.training(STATUS, always=True)
        console.row({"step": 1, "eval_loss": 0.5}, 10)
        console.alarm("an error")
    stream.close()


def test_characters_that_a_stream_lacks_are_escaped() -> None:
    binary = io.BytesIO()
    text = io.TextIOWrapper(binary, encoding="ascii", write_through=True)
    SafeStream(text).write("na\xefve\n")
    assert binary.getvalue() == b"na\\xefve\n"


def test_plain_lines_have_no_control_characters() -> None:
    printed: list[str] = []
    LineScreen(printed.append, 30.0).message("a\x1b[31mb\rc\td\ne")
    assert printed == ["a\\x1b[31mb\\rc\\td\ne"]


class OnTerminal:
    """A screen on a pseudo-terminal."""

    def __init__(self, columns: int):
        self.master, self.slave = pty.openpty()
        self.resize(columns)
        stream = SafeStream.of_descriptor(self.slave)
        self.screen = open_screen(stream, stream, ConsoleConfig())

    def resize(self, columns: int) -> None:
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def shown(self) -> str:
        text = b""
        while select.select([self.master], [], [], 0.05)[0]:
            text += os.read(self.master, 100_000)
        return text.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> OnTerminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    return OnTerminal(60)


def test_a_terminal_breaks_results_and_leaves_messages_whole(terminal: OnTerminal) -> None:
    terminal.resize(41)
    path = "/a/long-path/" + 50 * "x"
    lines = [
        "time       1 min 00 s of training, 3,840 pairs",
        "verdict: training loss 0.671 -> 0.64 in 8",
        path,
    ]
    terminal.screen.result("summary", {}, lines)
    shown = terminal.shown()
    assert f"time       1 min 00 s of training, 3,840\r\n{' ' * 11}pairs\r\n" in shown
    assert "verdict: training loss 0.671 -> 0.64 in\r\n    8\r\n" in shown
    assert path in shown
    terminal.screen.message("to upload it: wandb sync output/wandb/offline-run")
    assert "wandb sync output/wandb/offline-run" in terminal.shown()


def test_the_live_line_on_a_terminal(terminal: OnTerminal) -> None:
    """It is replaced in place, follows the width, stays below messages, and leaves the cursor visible."""
    screen = terminal.screen
    screen.progress(STATUS)
    assert "MFU" not in terminal.shown(), "60 columns"
    terminal.resize(150)
    screen.progress(STATUS)
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


def test_the_line_of_other_work_disappears_when_it_ends(terminal: OnTerminal) -> None:
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
