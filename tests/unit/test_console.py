"""Console: messages and progress as lines or a live line; logs of ranks; the closing table."""

import contextlib
import io
import json
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.console import (
    Console,
    JsonScreen,
    LineScreen,
    LiveScreen,
    is_notebook,
    open_console,
    open_screen,
    warnings_off,
)
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.streams import SafeStream
from dpo_dist.tools.tables import closing_table
from dpo_dist.training.steps.loop import Progress, show_row, show_step
from dpo_dist.training.steps.state import LogWindow

ATTACKS = "a\n2026-01-01 00:00:00 dpo_dist INFO forged\x1b[2J\x1b]52;c;eA==\x07\u202e\x9b.jsonl"
VALUES = {
    **{"loss": 0.51234, "rewards/accuracies": 0.78, "rewards/margins": 0.4123},
    **{"pairs_per_second": 1234.5, "mfu": 0.41, "memory/peak_bytes": 61.2 * 2**30},
}
STATUS = (120, 1000, VALUES, 7200.0)
LINE = (
    "step 120/1,000  loss 0.5123  accuracy 0.780  2 h 00 min left  margin 0.412  1,234.5 pairs/s  MFU 41 %"
    "  61.2 GiB"
)


@contextlib.contextmanager
def opened(run_dir: Path) -> Iterator[Console]:
    """Open a console with descriptor 2 as standard error, as in a process without pytest."""
    stderr = mock.patch.object(sys, "stderr", os.fdopen(2, "w", buffering=1, closefd=False))
    with stderr, open_console(RunFolder(run_dir).rank_log) as console:
        yield console


def log_of(run_dir: Path, rank: int = 0) -> str:
    return (run_dir / "logs" / f"rank-{rank}.log").read_text()


def test_the_log_has_a_repeated_warning_once_and_the_callers_logging_is_restored(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with warnings.catch_warnings(), opened(tmp_path):
        for _ in range(3):
            for text in ("a feature is deprecated", "another one is deprecated"):
                warnings.simplefilter("always")  # like some libraries
                warnings.warn(text, FutureWarning, stacklevel=1)
    assert log_of(tmp_path).count("FutureWarning: a feature is deprecated") == 1
    assert log_of(tmp_path).count("FutureWarning: another one is deprecated") == 1
    assert (root.handlers, root.level) == before
    with warnings_off():
        assert not logging.getLogger("a").isEnabledFor(logging.WARNING)
    assert logging.root.manager.disable == logging.NOTSET


def test_a_record_of_the_log_is_one_record_whatever_text_of_data_it_has(tmp_path: Path) -> None:
    with opened(tmp_path):
        logging.getLogger("dpo_dist.test").warning("the file %s is damaged", ATTACKS)
    logged = log_of(tmp_path)
    assert [line for line in logged.splitlines() if line[:2] != "  " and "dpo_dist.test" not in line] == []
    assert "\n  2026-01-01 00:00:00 dpo_dist INFO forged" in logged
    assert all(character.isprintable() or character == "\n" for character in logged)


def test_other_ranks_print_errors_only_and_log_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with opened(tmp_path) as console:
        console.say("good news")
        with console.progress("encoding train data", "record") as show:
            show(1)
        assert console.is_due()
        show_step(console, *STATUS)
        assert not console.is_due()
        console.alarm("process lost: rank 0 of 2 died")
    assert re.fullmatch(r"\d{4}-\S+ [\d:]{8}  process lost: rank 0 of 2 died\n", capfd.readouterr().err)
    logged = log_of(tmp_path, 1)
    assert [text for text in ("good news", "process lost", LINE) if text not in logged] == []
    assert "encoding" not in logged


def test_the_log_has_an_errors_traceback_and_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(DataError), opened(tmp_path):
        raise DataError("no pair", where="a.jsonl:3")
    assert "Traceback" in log_of(tmp_path)
    assert log_of(tmp_path).endswith("\ndata error: no pair\n  where:    a.jsonl:3\n")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: found.now)
    return found


def lines() -> tuple[Console, list[str]]:
    printed: list[str] = []
    return Console(LineScreen(printed.append)), printed


def test_progress_is_printed_now_and_then(clock: SimpleNamespace) -> None:
    console, printed = lines()
    with console.progress("encoding: a.jsonl", "record") as show:
        for number in range(1, 8):
            show(640 * number)
            clock.now += 10.0
    assert len(printed) == 2, "none in the first 30 seconds"
    assert printed[1] == "encoding: a.jsonl: 4,480 records, 64 a second"
    printed.clear()
    with console.progress("nothing", "record"), console.progress("log-probs", "pair") as show:
        show(0, 0)
        assert not printed
        clock.now += 100.0  # processes start
        show(0, 1200)
        clock.now += 30.0
        show(600, 1200)
    assert printed == [
        "log-probs: 600 of 1,200 pairs, 50 %, 20 a second, 30 s left",
    ]


def test_training_is_printed_now_and_then_and_always_on_demand_and_an_evaluation_always(
    clock: SimpleNamespace,
) -> None:
    console, printed = lines()
    for step in range(1, 11):
        if console.is_due():
            show_step(console, step, 1000, {"loss": 0.5}, 90.0)
        clock.now += 10.0
    assert [line.split("/")[0] for line in printed] == ["step 1", "step 4", "step 7", "step 10"]
    show_step(console, 1000, 1000, {"loss": 0.5}, always=True)
    show_row(console, {"step": 5, "loss": 0.5}, 1000)
    show_row(console, {"step": 5, "eval_loss": 0.25, "eval_rewards/accuracies": 0.75, "eval_pairs": 8}, 1000)
    samples = {"eval_samples/length": 3.0, "eval_samples/finished": 1.0, "eval_samples/prompts": 1.0}
    show_row(console, {"step": 6, "eval_loss": 0.25, **samples}, 1000)
    assert printed[4:] == [
        "step 1,000/1,000  loss 0.5000",
        "step 5/1,000  evaluation: loss 0.2500, accuracy 0.750",
        "step 6/1,000  evaluation: loss 0.2500, samples of 3 tokens, 1 of 1 finished",
    ]


def test_plain_lines_have_no_control_characters_and_those_that_a_stream_lacks_are_escaped() -> None:
    printed: list[str] = []
    Console(LineScreen(printed.append)).say("a\x1b[31mb\rc\td\ne")
    assert printed == ["a\\x1b[31mb\\rc\\td\ne"]
    binary = io.BytesIO()
    text = io.TextIOWrapper(binary, encoding="ascii", write_through=True)
    SafeStream(text).write("na\xefve\n")
    assert binary.getvalue() == b"na\\xefve\n"


def shown_on(master: int) -> str:
    """What a terminal has received."""
    shown = ""
    while select.select([master], [], [], 0.05)[0]:
        shown += os.read(master, 100_000).decode()
    return shown


@pytest.mark.parametrize("text", ["x", "warning: x", "error: x"])
def test_the_level_of_a_message_is_that_of_the_call_whatever_its_text(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs read it, and a terminal shows it as a colour."""
    printed: list[str] = []
    objects, plain = Console(JsonScreen(printed.append)), Console(LineScreen(printed.append))
    for console in (objects, plain):
        console.say(text)
        console.warn(text)
        console.show(text)
    levels = ["info", "warning", "info"]
    found = [json.loads(line) for line in printed[:3]]
    assert [(each["kind"], each["level"], each["text"]) for each in found] == [
        ("message", level, text) for level in levels
    ]
    assert printed[3:] == [text, f"warning: {text}", text]
    monkeypatch.setenv("TERM", "xterm-256color")
    master, _, screen = on_terminal()
    live = Console(screen)
    live.say(text)
    live.warn(text)
    live.alarm(text)
    assert (
        shown_on(master).replace("\r\n", "\n")
        == f"{text}\n\x1b[33mwarning: {text}\x1b[0m\n\x1b[1;31m{text}\x1b[0m\n"
    )


def on_terminal() -> tuple[int, int, LineScreen]:
    """The ends of a new terminal, and the screen on it."""
    master, slave = pty.openpty()
    stream = SafeStream(os.fdopen(slave, "w", buffering=1))
    return master, slave, open_screen(stream, stream, "auto")


@pytest.mark.parametrize("width", [1, 60, 80, 140])
def test_the_live_line_fits_the_terminal_with_its_bar(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave, screen = on_terminal()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    show_step(Console(screen), *STATUS)
    line = re.sub(r"\x1b\[[\d;?]*\w", "", shown_on(master)).rsplit("\r")[-1]
    assert "\n" not in line
    assert len(line) <= width
    assert line.startswith(LINE[: max(width - 22, 0)])
    assert (LINE in line) == (width > 130)
    assert width == 1 or line.rstrip().count("━") >= 2
    assert width < 80 or "2 h 00 min left" in line


def test_only_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert not isinstance(on_terminal()[2], LiveScreen)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with (tmp_path / "slurm.out").open("w") as file:
        screen = open_screen(SafeStream(file), SafeStream(sys.stdout), "auto")
    assert not isinstance(screen, LiveScreen)


def test_the_table_of_a_run() -> None:
    rows = [{"step": 5, "loss": 0.6931, "eval_loss": 0.6}, {"step": 60, "loss": 0.04123, "eval_loss": 0.7}]
    summary: dict[str, Any] = {
        **{"exit": "completed", "steps": 60, "best": {"eval_loss": {"value": 0.6, "step": 5}}},
        **{"pairs_seen": 3840, "train_seconds": 303.0, "pairs_per_second": 12.67},
    }
    folder = RunFolder(Path("out/run"))
    assert {
        "training loss    0.6931  0.0412",
        "evaluation loss  0.6000  0.7000  0.6000 at step 5",
        "run        completed 60 steps, 5 min 03 s of training, 3,840 pairs, 12.7 pairs/s",
        "model      out/run/model",
    } <= set(closing_table(folder, rows, summary))
    assert "model      out/run/model (step 5)" in closing_table(folder, rows, summary | {"model_step": 5})
    # A run that ends early has no model.
    assert closing_table(folder, [], {"exit": "preempted", "steps": 1}) == [
        "",
        "run        stopped after 1 step; the same command resumes from there",
        "report     out/run/report.html",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "on_path"), [("run", True), ("it's a [run]", True), ('a "b" $HOME', False)])
def test_the_line_that_talks_to_the_model_runs_in_a_shell(
    name: str, on_path: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also in a shell that does not find `dpo-dist`, or finds that of another environment."""
    scripts = Path(sys.executable).parent
    (other := tmp_path / "dpo-dist").write_text("#!/bin/sh\nexit 9\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scripts if on_path else tmp_path}:/usr/bin:/bin")
    lines = closing_table(RunFolder(tmp_path / name), [], {"exit": "completed", "steps": 1})
    [command] = [line.removeprefix("talk to it ") for line in lines if line.startswith("talk to it")]
    assert command.startswith("dpo-dist chat" if on_path else f"{sys.executable} -m dpo_dist chat")
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, "there is no such model"
    assert str(tmp_path / name) in ended.stderr


@pytest.mark.parametrize(("device", "is_shown"), [("cpu", False), ("meta", True)])
def test_the_share_of_the_peak_is_shown_for_devices_that_cost_more(device: str, is_shown: bool) -> None:
    shown = mock.Mock(spec=Console)
    progress = Progress(shown, 3, 1e9, torch.device(device), "pair")
    measures = LogWindow(steps=1, sums={"loss": 0.5}, counts={"loss": 1.0}, pairs=2, flops=1e8, seconds=1.0)
    with mock.patch("dpo_dist.training.steps.loop.peak_memory_bytes", return_value=1):
        progress.add(1, measures, must_stop=False)
    assert ("MFU 10 %" in shown.show_progress.call_args.args[1]) is is_shown


class Shell:
    """A notebook's kernel: outputs by display, streams without descriptors 1 and 2."""

    def __init__(self) -> None:
        self.kernel = SimpleNamespace(session=SimpleNamespace(pid=os.getpid()))
        self.outputs = list[str]()

    def get_ipython(self) -> "Shell":
        return self

    def display(self, data: dict[str, str], **options: Any) -> Any:
        assert options == {"raw": True, "display_id": True}
        at = len(self.outputs)
        self.outputs.append(data["text/plain"])

        def update(data: dict[str, str], raw: bool) -> None:
            assert raw
            self.outputs[at] = data["text/plain"]

        return SimpleNamespace(update=update)


def test_in_a_notebook_a_run_is_one_output_with_each_line_once_and_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    shell, streams = Shell(), (io.StringIO(), io.StringIO())
    monkeypatch.setitem(sys.modules, "IPython", shell)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", shell)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    library = logging.getLogger("a_library")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler(streams[0])])
    with open_console(RunFolder(tmp_path).rank_log) as console:
        print("a library's own words")
        library.warning("a library's handler")
        console.say("run directory: a\x1b[2J")
        with console.progress("encoding", "record") as show:
            show(1, 4)
            clock.now += 1.0
            show(1, 4)
            assert shell.outputs[-1].endswith("█████░░░░░░░░░░░░░░░  encoding: 1 of 4 records, 25 %")
        show_step(console, *STATUS, always=True)
        assert shell.outputs[-1].endswith(f"░  {LINE}")
    library.warning("after the run")
    assert len(shell.outputs) == 1
    first, last = shell.outputs[0].strip().split("\n")
    assert first == "run directory: a\\x1b[2J"
    assert last == f"██{'░' * 18}  {LINE}"
    assert (streams[0].getvalue(), streams[1].getvalue()) == ("after the run\n", "")
    assert (sys.stdout, sys.stderr) == streams
    assert log_of(tmp_path).count("a library's") == 3  # the handler's, and the root's
    assert log_of(tmp_path).count("run directory") == 1


def test_a_process_that_a_notebook_has_forked_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell()
    monkeypatch.setitem(sys.modules, "IPython", shell)  # type: ignore[arg-type]
    assert is_notebook()
    shell.kernel.session.pid += 1
    assert not is_notebook()
