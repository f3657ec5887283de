"""CSV records: line numbers, and damage."""

from pathlib import Path

import pytest

from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.foundation.errors import DataError
from tests.support.records import outcomes


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
        b"q," + b"a" * 200_000 + b",b\r\n"
    )
    records = list(read_records(str(file)))
    assert outcomes(records) == [
        *((2, ""), (5, "unparsable"), (6, "missing_field"), (7, ""), (8, "invalid_unicode"), (9, ""))
    ]
    first, quoted, long = (records[index] for index in (0, 3, 5))
    assert isinstance(first, PreferenceRecord)
    assert first.responses[0] == "two\nlines"
    assert isinstance(quoted, PreferenceRecord)
    assert quoted.prompt == 'say "hi"'
    assert isinstance(long, PreferenceRecord)
    assert len(long.responses[0]) == 200_000


@pytest.mark.parametrize("damaged", ['q,"never closed,b\n', '"say "hi"",a,b\n'])
def test_a_damaged_quote_is_an_error(tmp_path: Path, damaged: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"prompt,chosen,rejected\nq,a,b\n{damaged}q,a,b\n")
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_records(str(file)))
