"""Rows of JSON lines files that are missing, damaged or too large."""

from pathlib import Path

import pytest

from dpo_dist.insight.pages import render as module
from dpo_dist.insight.pages.render import json_rows, text_of


def rows(tmp_path: Path, content: bytes, most_bytes: int | None = None) -> list[dict[str, object] | None]:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    return list(json_rows(file, most_bytes))


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert list(json_rows(tmp_path / "none.jsonl")) == []


def test_damaged_lines_are_none_and_empty_ones_are_no_rows(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    content = b'{"a": 1}\n\n  \n[1]\n7\n{"a": \n\xff\n' + deep + b'\n{"a": 2}'
    assert rows(tmp_path, content) == [{"a": 1}, None, None, None, None, None, {"a": 2}]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_of_the_limit_is_read_and_a_longer_one_is_none(
    tmp_path: Path, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ROW_BYTES", 16)
    fits, long = (b'{"a": "%s"}' % (b"x" * length) for length in (6, 50))
    assert rows(tmp_path, fits + b"\n" + long + b"\n" + fits + end) == [
        {"a": "xxxxxx"},
        None,
        {"a": "xxxxxx"},
    ]
    assert rows(tmp_path, fits + b"\n" + long + end) == [{"a": "xxxxxx"}, None]


def test_reading_ends_with_the_line_that_exceeds_the_bytes(tmp_path: Path) -> None:
    line = b'{"a": 1}\n'
    assert [len(rows(tmp_path, line * 5, most)) for most in (0, len(line), len(line) + 1, 1000)] == [
        1,
        2,
        2,
        5,
    ]


def test_a_field_of_another_type_is_no_text() -> None:
    assert [text_of({"a": value}, "a") for value in ("x", "", 1, None)] == ["x", "", None, None]
    assert text_of({}, "a") is None
