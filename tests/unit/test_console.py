"""What a person sees of work whose end is not known."""

import io

import pytest

from dpo_dist.report import console as console_module
from dpo_dist.report.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_of_what_is_counted() -> None:
    screen = Terminal()
    with Console(screen).counter("encoding train data", "record") as count:
        for _ in range(3):
            count(64)
    assert "encoding train data" in screen.getvalue()
    assert "192record" in screen.getvalue()


def test_elsewhere_plain_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("screen", [Terminal(), io.StringIO()])
def test_nothing_is_shown_of_work_that_is_not_done(screen: io.StringIO) -> None:
    with Console(screen).counter("encoding train data", "record"):
        pass
    assert not screen.getvalue()


def test_other_ranks_are_silent() -> None:
    with Console(None).counter("encoding train data", "record") as count:
        count(1)
