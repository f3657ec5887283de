"""Files of every kind: line numbers, no record lost, errors at once."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from dpo_dist.config.data import SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.data.sources import check_source
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support.records import TEXT, assistant, jsonl, outcomes, user


def test_jsonl_records_have_the_line_numbers_of_an_editor(tmp_path: Path) -> None:
    row = json.dumps(TEXT | {"chosen": "one\u2028two"}, ensure_ascii=False).encode()
    broken = row[: len(row) // 2]
    not_utf8 = row.replace(b"bad", b"b\xe4d")
    file = tmp_path / "records.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([row, b"", row + b"\r", broken, not_utf8, b"[" * 100_000, row])
    )
    assert outcomes(read_records(str(file))) == [
        (1, ""),
        (3, ""),
        (4, "unparsable"),
        (5, "unparsable"),
        (6, "unparsable"),
        (7, ""),
    ]


def test_a_bad_record_never_quotes_its_text(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(
        '{"prompt": "secret\n"secret"\n{"prompt": "secret", "chosen": "secret", "rejected": "secret"}\n'
    )
    records = list(read_records(str(file)))
    assert len(records) == 3
    assert all(isinstance(record, BadRecord) and "secret" not in record.detail for record in records)


def test_records_of_a_json_array_are_numbered(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([TEXT, "no object", TEXT]))
    assert outcomes(read_records(str(file))) == [(1, ""), (2, "unparsable"), (3, "")]


def test_parquet_has_the_same_records_as_jsonl(tmp_path: Path) -> None:
    row = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    rows = [row | {"score_chosen": float(number), "score_rejected": 0.0} for number in range(1, 4)]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    from_parquet = list(read_records(str(file)))
    from_jsonl = list(read_records(jsonl(tmp_path, *rows)))
    for one, other in zip(from_parquet, from_jsonl, strict=True):
        assert isinstance(one, PreferenceRecord)
        assert isinstance(other, PreferenceRecord)
        assert (one.prompt, one.responses, one.scores) == (other.prompt, other.responses, other.scores)
        assert one.origin.line == other.origin.line


def test_a_parquet_column_that_occurs_twice_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "records.parquet"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pyarrow.parquet.write_table(pa.Table.from_arrays(columns, ["prompt", "chosen", "chosen"]), file)
    with pytest.raises(DataError, match="two columns") as raised:
        read_records(str(file))
    assert raised.value.where == str(file)


def test_a_saved_folder_has_the_configured_split(tmp_path: Path) -> None:
    splits = {"train": Dataset.from_list([TEXT]), "test": Dataset.from_list([TEXT, TEXT])}
    DatasetDict(splits).save_to_disk(tmp_path / "splits")
    splits["test"].save_to_disk(tmp_path / "one")
    splitted = str(tmp_path / "splits")
    assert len(list(read_records(splitted))) == 1
    assert len(list(read_records(SourceConfig(path=splitted, split="test")))) == 2
    assert len(list(read_records(str(tmp_path / "one")))) == 2
    with pytest.raises(DataError, match="train, test"):
        read_records(SourceConfig(path=splitted, split="validation"))
    with pytest.raises(ConfigError):
        read_records(SourceConfig(path=str(tmp_path / "one"), split="test"))


def test_limit_takes_the_first_records_only(tmp_path: Path) -> None:
    path = jsonl(tmp_path, TEXT, [], TEXT, TEXT)
    assert outcomes(read_records(SourceConfig(path=path, limit=3))) == [(1, ""), (2, "unparsable"), (3, "")]
    with pytest.raises(ValueError, match="limit"):
        SourceConfig(path=path, limit=0)


def test_a_missing_file_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    jsonl(tmp_path, TEXT)
    with pytest.raises(DataError, match=r"records\.jsonl") as fault:
        read_records(str(tmp_path / "record.jsonl"))
    assert "records.jsonl" in fault.value.remedy
    with pytest.raises(DataError, match="no folder"):
        read_records(str(tmp_path / "nowhere" / "records.jsonl"))


def test_an_option_or_ending_without_effect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_records(SourceConfig(path=jsonl(tmp_path, TEXT), split="train"))
    other = tmp_path / "rows.txt"
    other.write_text("")
    with pytest.raises(DataError, match=r"\.jsonl"):
        read_records(str(other))


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,chosen,chosen\nq,a,b\n")
    with pytest.raises(DataError, match="same name"):
        read_records(str(file))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.csv", "prompt,chosen,rejected\n"), ("a.json", "[]")]
)
def test_a_source_without_records_is_refused_at_the_start(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    source = SourceConfig(str(tmp_path / name))
    with pytest.raises(DataError, match="no records"):
        check_source(source)
    # The doctor counts it.
    check_source(source, needs_pairs=False)
