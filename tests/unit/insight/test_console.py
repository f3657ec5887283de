"""Console: messages and progress as lines, and no repeated warnings in the log."""

import contextlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.errors import DataError
from dpo_dist.insight.console import Console, LineScreen, TrainingStatus, open_console, warnings_off


@contextlib.contextmanager
def opened(run_dir: Path) -> Iterator[Console]:
    """Open a console with descriptor 2 as standard error, as in a process without pytest."""
    stderr = mock.patch.object(sys, "stderr", os.fdopen(2, "w", buffering=1, closefd=False))
    with stderr, open_console(RunFolder(run_dir)) as console:
        yield console


def test_a_repeated_warning_is_logged_once_and_the_callers_logging_is_restored(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with warnings.catch_warnings(), opened(tmp_path):
        assert root.level == logging.INFO != before[1]
        for _ in range(3):
            for text in ("a feature is deprecated", "another one is deprecated"):
                warnings.simplefilter("always")  # like some libraries
                warnings.warn(text, FutureWarning, stacklevel=1)
    logged = (tmp_path / "logs" / "rank-0.log").read_text()
    assert logged.count("FutureWarning: a feature is deprecated") == 1
    assert logged.count("FutureWarning: another one is deprecated") == 1
    assert (root.handlers, root.level) == before
    assert logging.getLogger("py.warnings").filters == []


ATTACKS = (
    "a\n2026-01-01 00:00:00 dpo_dist INFO forged\x1b[2J\x1b]52;c;eA==\x07\x1b]8;;http://x\x07\u202e\x9b.jsonl"
)


def test_a_record_of_the_log_is_one_record_whatever_text_of_data_it_has(tmp_path: Path) -> None:
    with opened(tmp_path):
        logging.getLogger("dpo_dist.test").warning("the file %s is damaged", ATTACKS)
        try:
            raise ValueError(ATTACKS)
        except ValueError:
            logging.getLogger("dpo_dist.test").exception("a bug")
    logged = (tmp_path / "logs" / "rank-0.log").read_text()
    lines = logged.splitlines()
    assert [line for line in lines if not line.startswith("  ") and "dpo_dist.test" not in line] == []
    assert sum("forged" in line and line.startswith("  ") for line in lines) == 2
    assert all(character.isprintable() or character == "\n" for character in logged)


@pytest.mark.parametrize("captured", [False, True])
def test_the_callers_logging_and_warnings_are_as_before(captured: bool, tmp_path: Path) -> None:
    logging.captureWarnings(captured)
    logging.disable(logging.INFO)
    try:
        before = warnings.showwarning
        with opened(tmp_path), warnings_off():
            assert not logging.getLogger("a").isEnabledFor(logging.WARNING)
        assert warnings.showwarning is before
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.captureWarnings(False)
        logging.disable(logging.NOTSET)


def test_only_rank_0_prints_but_every_rank_can_print_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with opened(tmp_path) as console:
        console.say("good news")
        console.alarm("process lost: rank 0 of 2 died")
    assert re.fullmatch(r"\d{4}-\S+ [\d:]{8}  process lost: rank 0 of 2 died\n", capfd.readouterr().err)
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


def test_a_heartbeat_is_silent_beside_progress(clock: "Clock") -> None:
    console, printed = lines()
    beat = console.heartbeat("preparing the data")
    with console.counter("encoding the data", "record") as count:
        count(1, 0.1)
        beat(16.0)
        assert printed == ["encoding the data ..."]
        clock.now += 16
        beat(32.0)
        assert printed[1:] == ["preparing the data: 32 s so far"]


def test_a_heartbeat_is_printed_once_a_minute(clock: "Clock") -> None:
    console, printed = lines()
    beat = console.heartbeat("encoding the data")
    for seconds in range(5, 200, 5):
        beat(float(seconds))
    spent = ("15 s", "1 min 15 s", "2 min 15 s", "3 min 15 s")
    assert printed == [f"encoding the data: {each} so far" for each in spent]


class Clock:
    """The monotonic clock, set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found)
    return found


def lines(seconds: float = 30.0) -> tuple[Console, list[str]]:
    """Return a console without times and the list of its lines."""
    printed: list[str] = []
    return Console(LineScreen(printed.append, seconds)), printed


def test_a_counter_prints_lines_now_and_then(clock: Clock) -> None:
    console, printed = lines()
    with console.counter("encoding train data: a.jsonl", "record") as count:
        for number in range(1, 9):
            count(640, number / 16)
            clock.now += 10.0
    assert printed == [
        "encoding train data: a.jsonl ...",
        "encoding train data: a.jsonl: 1,280 records, 12 %, 128 a second, 1 min 10 s left",
        "encoding train data: a.jsonl: 3,200 records, 31 %, 80 a second, 1 min 28 s left",
        "encoding train data: a.jsonl: 5,120 records, 50 %, 73 a second, 1 min 10 s left",
    ]


def test_a_counter_without_shares_shows_amount_and_speed(clock: Clock) -> None:
    console, printed = lines()
    for _ in range(2):  # the second source starts anew
        with console.counter("encoding", "record") as count:
            count(1)
            clock.now += 6.0
            count(59)
    assert printed == ["encoding ...", "encoding: 60 records, 10 a second"] * 2


def test_progress_of_a_known_total_is_shown_and_a_total_of_zero_is_not(clock: Clock) -> None:
    console, printed = lines()
    with console.counter("encoding train data", "record"):
        pass  # without counts
    with console.progress("reference log-probs", "pair") as show:
        show(0, 0)
        assert not printed
        show(0, 1200)
        clock.now += 10.0
        show(600, 1200)
    assert printed == [
        "reference log-probs ...",
        "reference log-probs: 600 of 1,200 pairs, 50 %, 60 a second, 10 s left",
    ]


def test_other_ranks_log_their_steps_and_show_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with opened(tmp_path) as console:
        with console.counter("encoding train data", "record") as count:
            count(1)
        assert console.is_due()
        console.training(status(1))
        assert not console.is_due()
    logged = (tmp_path / "logs" / "rank-1.log").read_text()
    assert "step 1/1,000  loss 0.5000" in logged
    assert "encoding" not in logged
    assert capfd.readouterr() == ("", "")


def status(step: int, **values: float) -> TrainingStatus:
    return TrainingStatus(step, 1000, {"loss": 0.5, **values}, seconds_left=90.0)


def test_training_is_printed_now_and_then_and_always_on_demand(clock: Clock) -> None:
    console, printed = lines(30.0)
    for step in range(1, 11):
        if console.is_due():
            console.training(status(step))
        clock.now += 10.0
    assert [line.split("/")[0] for line in printed] == ["step 1", "step 4", "step 7", "step 10"]
    console.training(status(1000), always=True)
    assert printed[-1] == "step 1,000/1,000  loss 0.5000"


def test_an_evaluation_is_always_printed_and_a_row_of_steps_is_not() -> None:
    console, printed = lines()
    console.row({"step": 5, "loss": 0.5}, 1000)
    console.row({"step": 5, "eval_loss": 0.25, "eval_rewards/accuracies": 0.75, "eval_pairs": 8}, 1000)
    assert printed == ["step 5/1,000  evaluation: loss 0.2500, accuracy 0.750"]


def test_progress_is_logged_whatever_the_screen_shows(tmp_path: Path) -> None:
    with opened(tmp_path) as console:
        console.training(status(1), always=True)
    logged = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "dpo_dist INFO step 1/1,000  loss 0.5000  1 min 30 s left" in logged
