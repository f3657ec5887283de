"""CSV records: line numbers, and damage limited to its own lines."""

import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_dist.data import read as csv_records
from dpo_dist.data import read as read_file
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.foundation.errors import DataError
from tests.support.records import outcomes

HEADER = "prompt,chosen,rejected\n"


def read(folder: Path, content: str) -> list[PreferenceRecord | BadRecord]:
    file = folder / "rows.csv"
    file.write_text(HEADER + content)
    return list(read_records(str(file)))


def good_lines(records: list[PreferenceRecord | BadRecord]) -> list[int]:
    return [record.origin.line for record in records if isinstance(record, PreferenceRecord)]


def test_csv_records_have_the_line_of_their_start(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(
        b"\xef\xbb\xbfprompt,chosen,rejected\r\n"
        b'q,"two\nlines",b\r\n'
        b"\r\n"
        b"q,a,b,too many\r\n"
        b"q,too few\r\n"
        b'"say ""hi""",a,b\r\n'
        b"q,b\xe4d,b\r\n"
        b'q,"never closed,b\r\nq,a,b\r\n'
    )
    records = list(read_records(str(file)))
    assert outcomes(records) == [
        (2, ""),
        (5, "unparsable"),
        (6, "missing_field"),
        (7, ""),
        (8, "invalid_unicode"),
        (9, "unparsable"),
        (10, ""),
    ]
    first, quoted = records[0], records[3]
    assert isinstance(first, PreferenceRecord)
    assert first.responses[0] == "two\nlines"
    assert isinstance(quoted, PreferenceRecord)
    assert quoted.prompt == 'say "hi"'


@pytest.mark.parametrize(
    "row",
    [
        "q{n},right {n},wrong {n}",
        '"q{n}","right, {n}","wrong\nover two lines {n}"',
        '"q{n}",right {n},"w ""{n}"""',
    ],
    ids=["bare", "quoted", "mixed"],
)
@pytest.mark.parametrize(
    "damaged", ['q,"never closed,b', '"q","a","never closed', '"q,a,b', '"say "hi"",a,b']
)
def test_a_damaged_quote_affects_its_own_line_only(tmp_path: Path, row: str, damaged: str) -> None:
    rows = [row.format(n=n) for n in range(1000)]
    rows[100] = damaged
    records = read(tmp_path, "".join(f"{each}\n" for each in rows))
    assert len(records) == 1000
    [bad] = [record for record in records if isinstance(record, BadRecord)]
    lines_before = 1 + sum(1 + each.count("\n") for each in rows[:100])
    assert (bad.reason, bad.origin.line) == ("unparsable", lines_before + 1)
    last = records[-1]
    assert last.origin.line == lines_before + sum(1 + each.count("\n") for each in rows[100:999]) + 1


def test_the_rest_of_a_damaged_cell_is_no_record(tmp_path: Path) -> None:
    """The lines inside the cell have as many commas as a record."""
    cell = 'q,a,"He said "hi, and\nfirst, second, third\nfourth, fifth, sixth"\n'
    records = read(tmp_path, f"q,a,b\n{cell}q,a,b\n")
    assert good_lines(records) == [2, 6]
    assert [record.reason for record in records if isinstance(record, BadRecord)] == ["unparsable"] * 3


def test_an_unclosed_cell_that_another_line_closes_hides_no_lines(tmp_path: Path) -> None:
    """The number of cells made this way equals that of a record with other columns."""
    records = read(tmp_path, 'q,"open,b\nq,a,b\nq,a,it ends here"\nq,a,b\n')
    assert len(records) == 4
    assert good_lines(records)[-1] == 5


def test_three_unclosed_cells_affect_three_lines_and_keep_the_order(tmp_path: Path) -> None:
    rows = [f"q{n},a,b" for n in range(40)]
    rows[10] = rows[20] = rows[30] = 'q,"open,b'
    records = read(tmp_path, "".join(f"{row}\n" for row in rows))
    assert [line for line, reason in outcomes(records) if reason] == [12, 22, 32]
    prompts = [record.prompt for record in records if isinstance(record, PreferenceRecord)]
    assert prompts == [f"q{n}" for n in range(40) if n not in (10, 20, 30)]


def test_a_record_above_the_limit_is_bad_and_reading_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_file, "_MAX_RECORD_BYTES", 1000)
    many_lines = '"' + "line\n" * 300
    records = read(tmp_path, f"q,a,b\n{'x' * 3000},a,b\nq,a,b\n{many_lines}")
    assert outcomes(records)[:3] == [(2, ""), (3, "unparsable"), (4, "")]
    assert len(records) == 3 + 300
    assert good_lines(records) == [2, 4]


def test_csv_cell_of_any_length_is_read(tmp_path: Path) -> None:
    [record] = read(tmp_path, f"q,{'a' * 200_000},b\n")
    assert isinstance(record, PreferenceRecord)
    assert len(record.responses[0]) == 200_000


@pytest.mark.parametrize("header", ['"prompt,chosen\nq,a\n', 'prompt,"cho"sen"\n'])
def test_a_damaged_header_is_refused(tmp_path: Path, header: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(header)
    with pytest.raises(DataError, match="header of the CSV file cannot be parsed"):
        read_records(str(file))


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_is_named(tmp_path: Path, separator: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(separator.join(("prompt", "chosen", "rejected")) + "\n")
    with pytest.raises(DataError, match="not separated by commas"):
        read_records(str(file))


def test_lines_read_ahead_are_looked_at_once(tmp_path: Path) -> None:
    """Else reading takes a time that grows with the square of the lines."""
    looked = 0

    class Counted(deque[str]):
        def __iter__(self) -> Iterator[str]:
            nonlocal looked
            for line in super().__iter__():
                looked += 1
                yield line

    damaged = 'q,"open,b\n' + 'q,""a,b\n' * 300
    lines = csv_records._Lines(io.StringIO(damaged), 2**24)
    lines._ahead = Counted()
    while lines.cells()[0] is None and lines.taken:
        list(lines.go_back())
    assert 0 < looked < 2000
