"""Console: readable progress on the screen, and no repeated warnings in the log."""

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.errors import DataError
from dpo_dist.report import console as console_module
from dpo_dist.report.console import Console, open_console


@contextlib.contextmanager
def opened(run_dir: Path) -> Iterator[Console]:
    """Open a console with descriptor 2 as standard error, as in a process without pytest."""
    stderr = mock.patch.object(sys, "stderr", os.fdopen(2, "w", buffering=1, closefd=False))
    with stderr, open_console(RunFolder(run_dir)) as console:
        yield console


def warn(text: str) -> None:
    """Warn like some libraries: reset all filters first."""
    warnings.simplefilter("always")
    warnings.warn(text, FutureWarning, stacklevel=1)


def test_a_repeated_warning_is_logged_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(), opened(tmp_path):
        for _ in range(3):
            warn("a feature is deprecated")
            warn("another one is deprecated")
    logged = (tmp_path / "logs" / "rank-0.log").read_text()
    assert logged.count("FutureWarning: a feature is deprecated") == 1
    assert logged.count("FutureWarning: another one is deprecated") == 1
    assert logging.getLogger("py.warnings").filters == []


def test_the_callers_logging_is_restored(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with opened(tmp_path):
        assert root.level == logging.INFO != before[1]
    assert (root.handlers, root.level) == before


@pytest.mark.parametrize("captured", [False, True])
def test_the_callers_warnings_are_shown_as_before(captured: bool, tmp_path: Path) -> None:
    logging.captureWarnings(captured)
    try:
        before = warnings.showwarning
        with opened(tmp_path):
            pass
        assert warnings.showwarning is before
    finally:
        logging.captureWarnings(False)


def test_only_rank_0_prints_but_every_rank_can_print_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with opened(tmp_path) as console:
        console.say("good news")
        console.alarm("process lost: rank 0 of 2 died")
    assert capfd.readouterr().err == "process lost: rank 0 of 2 died\n"
    logged = (tmp_path / "logs" / "rank-1.log").read_text()
    assert "good news" in logged
    assert "process lost" in logged


def test_the_log_has_an_errors_traceback_and_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(DataError), opened(tmp_path):
        raise DataError("no pair", where="a.jsonl:3")
    logged = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "Traceback" in logged
    assert logged.endswith("\ndata error: no pair\n  where:    a.jsonl:3\n")


def test_a_full_disk_does_not_hide_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log cannot be written: the error stays the same, and the screen is restored for it."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").symlink_to("/dev/full")
    output = os.fdopen(1, "w", closefd=False)
    monkeypatch.setattr(sys, "stdout", output)

    def fail() -> None:
        output.write("of a library\n")
        raise DataError("no pair", where="a.jsonl:3")

    with pytest.raises(DataError), opened(tmp_path):
        fail()
    os.write(2, b"printed")
    assert capfd.readouterr().err == "printed"
    output.flush()


def test_a_heartbeat_is_printed_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    console, said = Console(None), []
    monkeypatch.setattr(Console, "say", lambda _self, text: said.append(text))
    beat = console.heartbeat("encoding the data")
    for seconds in range(5, 200, 5):
        beat(float(seconds))
    assert said == [f"encoding the data: {seconds} s so far" for seconds in (15, 75, 135, 195)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_counter_on_a_terminal_is_a_bar() -> None:
    screen = Terminal()
    with Console(screen).counter("encoding train data", "record") as count:
        for _ in range(3):
            count(64)
    assert "encoding train data" in screen.getvalue()
    assert "192record" in screen.getvalue()


def test_a_counter_with_shares_shows_the_remaining_time() -> None:
    screen = Terminal()
    with Console(screen).counter("encoding train data: a.jsonl", "record") as count:
        for share in (0.25, 0.5, 1.0):
            count(640, share)
            time.sleep(0.001)
    last = screen.getvalue().split("\r")[-1]
    assert "encoding train data: a.jsonl: 100%|" in last
    assert "1,920 records, " in last
    assert "<00:00]" in last


def test_a_bar_appears_with_its_total_and_not_at_all_for_a_total_of_zero() -> None:
    screen = Terminal()
    with Console(screen).progress("reference", "pair") as show:
        show(0, 120)
        assert "0/120" in screen.getvalue()
        show(120, 120)
    assert "120/120" in screen.getvalue()
    idle = Terminal()
    with Console(idle).progress("reference", "pair") as show:
        show(0, 0)
    assert not idle.getvalue()


def test_a_counter_without_a_terminal_prints_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, seconds = io.StringIO(), iter(range(0, 1000, 10))
    monkeypatch.setattr(console_module.time, "monotonic", lambda: float(next(seconds)))
    with Console(screen).counter("encoding train data", "record") as count:
        for _ in range(5):
            count(640)
    assert screen.getvalue().splitlines() == [
        "encoding train data ...",
        "encoding train data: 1,280 records, 128 a second",
        "encoding train data: 3,200 records, 80 a second",
    ]


def test_a_line_of_a_counter_has_the_share_and_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, seconds = io.StringIO(), iter(range(0, 1000, 10))
    monkeypatch.setattr(console_module.time, "monotonic", lambda: float(next(seconds)))
    with Console(screen).counter("encoding train data: a.jsonl", "record") as count:
        for number in range(1, 3):
            count(640, number / 8)
    assert screen.getvalue().splitlines() == [
        "encoding train data: a.jsonl ...",
        "encoding train data: a.jsonl: 25%, 1,280 records, 128 a second, 00:30 left",
    ]


@pytest.mark.parametrize("screen", [Terminal(), io.StringIO()])
def test_a_counter_without_counts_shows_nothing(screen: io.StringIO) -> None:
    with Console(screen).counter("encoding train data", "record"):
        pass
    assert not screen.getvalue()


def test_other_ranks_show_no_counter() -> None:
    with Console(None).counter("encoding train data", "record") as count:
        count(1)
