"""The doctor's report on a terminal: plain text without a terminal, readable at any width."""

import contextlib
import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.insight.pages.doctor import print_diagnosis
from tests.unit.insight.doctor.test_page import HOSTILE, diagnosis


def printed(text: str = "data.jsonl", **screen: object) -> str:
    stream = io.StringIO()
    print_diagnosis(
        diagnosis(text), RunFolder(Path("out/run")), Console(file=stream, highlight=False, **screen)
    )  # type: ignore[arg-type]
    return stream.getvalue()


def test_the_report_in_a_file_is_plain_text() -> None:
    lines = printed().splitlines()
    assert [line.split() for line in lines if line.startswith(" data.jsonl")] == [
        ["data.jsonl", "train", "10", "8", "2", "8", "3", "tokens", "3", "tokens"]
    ]
    shown = "\n".join(lines)
    for expected in (
        "error rule_error data.jsonl\n  data.jsonl\n  to do: data.jsonl\n  first: data.jsonl:4\nwarning",
        "4 of 10 pairs in the store",
        "1 error, 1 warning, 1 note\npage: out/run/doctor/doctor.html",
    ):
        assert expected in shown
    assert lines[-1] == "page: out/run/doctor/doctor.html"
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [30, 60, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = printed(
        "some/folder/with/a/long/name/pairs.jsonl", force_terminal=True, width=width, color_system=None
    )
    assert all(len(line) <= width for line in lines.splitlines()[:-1])
    assert "10 read, 8 kept, 2 dropped" in lines or width == 100


def test_texts_cannot_act_on_the_terminal() -> None:
    for markup in (HOSTILE, "[bold]x[/bold]", "a\nb"):
        shown = printed(markup)
        assert not {"\x1b", "\u202e", "\u200b"} & set(shown)
    assert "[bold]x[/bold]" in printed("[bold]x[/bold]")


def test_a_reader_that_goes_away_does_not_change_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich would exit with 1, the code of findings."""
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stdout", stream)
        print_diagnosis(diagnosis("data.jsonl"), RunFolder(Path("out/run")))
        monkeypatch.undo()
