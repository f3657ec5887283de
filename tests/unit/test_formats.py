"""What comes out of files: records as they were written, and a reason for each that cannot be used."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from dpo_dist.config.schema import DataFormat, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, Dialogue, Message, PreferenceRecord
from dpo_dist.errors import ConfigError, DataError
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
needs_shared_data = pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")

TEXT = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def jsonl(folder: Path, *rows: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def read_one(folder: Path, row: Any, layout: DataFormat = DataFormat.auto) -> PreferenceRecord | BadRecord:
    [record] = read_records(SourceConfig(path=jsonl(folder, row), format=layout))
    return record


def outcomes(records: Iterator[PreferenceRecord | BadRecord]) -> list[tuple[int, str]]:
    return [
        (record.origin.line, record.reason if isinstance(record, BadRecord) else "") for record in records
    ]


def test_hh_dialogue_is_split_at_its_last_answer(tmp_path: Path) -> None:
    history = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    record = read_one(tmp_path, {"chosen": history + " yes", "rejected": history + " no "})
    assert isinstance(record, PreferenceRecord)
    assert record.prompt == Dialogue(history)
    assert record.responses == (" yes", " no ")
    assert isinstance(record.prompt, Dialogue)
    assert record.prompt.messages() == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")},
        {"prompt": [user("q")], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {
            "prompt": [user("q")],
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
        },
    ],
)
def test_every_way_to_write_a_conversation_gives_the_same_record(tmp_path: Path, row: dict[str, Any]) -> None:
    record = read_one(tmp_path, row)
    assert isinstance(record, PreferenceRecord)
    assert record.prompt == (Message("user", "q"),)
    assert record.responses == ("good", "bad")


def test_plain_text_is_left_as_it_is(tmp_path: Path) -> None:
    row = {"prompt": " q\u00a0\r\n", "chosen": "\u200bgood\n", "rejected": " bad\u2028"}
    record = read_one(tmp_path, row)
    assert isinstance(record, PreferenceRecord)
    assert (record.prompt, *record.responses) == (row["prompt"], row["chosen"], row["rejected"])


@pytest.mark.parametrize("where", ["row", "metadata"])
def test_scores_stand_beside_their_responses(tmp_path: Path, where: str) -> None:
    scores = {"score_rejected": 2, "score_chosen": 4.5}
    record = read_one(tmp_path, TEXT | (scores if where == "row" else {"metadata": scores}))
    assert isinstance(record, PreferenceRecord)
    assert record.scores == (4.5, 2.0)


H = "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1, 2], "unparsable"),
        ({"messages": [user("q"), assistant("a")], "label": True}, "unknown_format"),
        ({"instruction": "q", "chosen": "good", "rejected": "bad"}, "unknown_format"),
        (
            {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
            "unknown_format",
        ),
        ({"prompt": "q", "chosen": "good"}, "missing_field"),
        (TEXT | {"rejected": None}, "missing_field"),
        ({"chosen": H + " a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "history_differs"),
        ({"chosen": H + " a", "rejected": H + " a\n\nHuman: q"}, "not_one_answer"),
        ({"chosen": H + " a", "rejected": H + "  \n"}, "empty_response"),
        ({"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"}, "empty_prompt"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
            "history_differs",
        ),
        (
            {
                "prompt": "other",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            "history_differs",
        ),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q")]}, "not_one_answer"),
        ({"prompt": [user("q")], "chosen": [], "rejected": []}, "not_one_answer"),
        (
            {"prompt": [user("q")], "chosen": assistant("a") | {"tool_calls": [{}]}, "rejected": "b"},
            "unread_content",
        ),
        ({"prompt": [{"role": "user", "content": ["q"]}], "chosen": "a", "rejected": "b"}, "unread_content"),
        (TEXT | {"prompt": " \n"}, "empty_prompt"),
        (TEXT | {"chosen": "\t"}, "empty_response"),
        (TEXT | {"chosen": " bad\n"}, "identical_responses"),
        (TEXT | {"score_chosen": 1.0}, "invalid_scores"),
        (TEXT | {"score_chosen": float("nan"), "score_rejected": 0}, "invalid_scores"),
        (TEXT | {"chosen": "\ud800"}, "invalid_unicode"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(tmp_path: Path, row: Any, reason: str) -> None:
    record = read_one(tmp_path, row)
    assert isinstance(record, BadRecord)
    assert record.reason == reason


def test_an_unknown_layout_names_the_keys_found(tmp_path: Path) -> None:
    record = read_one(tmp_path, {"label": True, "messages": []})
    assert isinstance(record, BadRecord)
    assert "label" in record.detail
    assert "messages" in record.detail


def test_an_explicit_format_is_not_second_guessed(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": H + " a", "rejected": H + " b"}
    as_text = read_one(tmp_path, row, DataFormat.text)
    as_hh = read_one(tmp_path, row, DataFormat.hh)
    assert isinstance(as_text, PreferenceRecord)
    assert as_text.prompt == "q"
    assert isinstance(as_hh, PreferenceRecord)
    assert as_hh.prompt == Dialogue(H)
    forced = read_one(tmp_path, row, DataFormat.messages)
    assert isinstance(forced, PreferenceRecord)
    assert forced.prompt == (Message("user", "q"),)
    assert isinstance(read_one(tmp_path, {"chosen": 1, "rejected": 2}, DataFormat.messages), BadRecord)
    assert isinstance(read_one(tmp_path, {"chosen": 0, "rejected": 0}, DataFormat.hh), BadRecord)
    assert isinstance(read_one(tmp_path, {"chosen": 1, "rejected": 2}, DataFormat.text), BadRecord)


def test_jsonl_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    row = json.dumps(TEXT | {"chosen": "one\u2028two"}, ensure_ascii=False).encode()
    broken = row[: len(row) // 2]
    not_utf8 = row.replace(b"bad", b"b\xe4d")
    file = tmp_path / "rows.jsonl"
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
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "secret\n"secret"\n{"prompt": "secret", "chosen": "secret", "rejected": "secret"}\n'
    )
    records = list(read_records(str(file)))
    assert len(records) == 3
    assert all(isinstance(record, BadRecord) and "secret" not in record.detail for record in records)


def test_csv_records_carry_the_line_where_they_start(tmp_path: Path) -> None:
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
    assert outcomes(iter(records)) == [
        (2, ""),
        (5, "unparsable"),
        (6, "missing_field"),
        (7, ""),
        (8, "invalid_unicode"),
        (9, "unparsable"),
    ]
    first, quoted = records[0], records[3]
    assert isinstance(first, PreferenceRecord)
    assert first.responses[0] == "two\nlines"
    assert isinstance(quoted, PreferenceRecord)
    assert quoted.prompt == 'say "hi"'


def test_csv_cell_of_any_length_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"prompt,chosen,rejected\nq,{'a' * 200_000},b\n")
    [record] = read_records(str(file))
    assert isinstance(record, PreferenceRecord)
    assert len(record.responses[0]) == 200_000


def test_json_array_counts_records(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([TEXT, "no object", TEXT]))
    assert outcomes(read_records(str(file))) == [(1, ""), (2, "unparsable"), (3, "")]


@pytest.mark.parametrize("content", ['{"chosen": 1}', '{"chosen": 1}\n{"chosen": 2}\n', ""])
def test_json_that_is_no_array_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(DataError):
        read_records(str(file))


def test_parquet_gives_the_same_records_as_jsonl(tmp_path: Path) -> None:
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


def test_parquet_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_text("no parquet")
    with pytest.raises(DataError, match="not Parquet"):
        read_records(str(file))


def test_saved_folder_gives_the_split_asked_for(tmp_path: Path) -> None:
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


def test_folder_that_datasets_did_not_save_names_its_files(tmp_path: Path) -> None:
    jsonl(tmp_path, TEXT)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        read_records(str(tmp_path))


def test_limit_takes_the_first_records_only(tmp_path: Path) -> None:
    path = jsonl(tmp_path, TEXT, [], TEXT, TEXT)
    assert outcomes(read_records(SourceConfig(path=path, limit=3))) == [(1, ""), (2, "unparsable"), (3, "")]
    with pytest.raises(ConfigError):
        read_records(SourceConfig(path=path, limit=0))


def test_missing_file_is_told_at_once_with_its_nearest_name(tmp_path: Path) -> None:
    jsonl(tmp_path, TEXT)
    with pytest.raises(DataError, match=r"rows\.jsonl") as fault:
        read_records(str(tmp_path / "row.jsonl"))
    assert "rows.jsonl" in fault.value.remedy
    with pytest.raises(DataError, match="no such folder"):
        read_records(str(tmp_path / "nowhere" / "rows.jsonl"))


def test_an_option_or_ending_without_effect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_records(SourceConfig(path=jsonl(tmp_path, TEXT), split="train"))
    other = tmp_path / "rows.txt"
    other.write_text("")
    with pytest.raises(DataError, match=r"\.jsonl"):
        read_records(str(other))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,chosen,chosen\nq,a,b\n")
    with pytest.raises(DataError, match="same name"):
        read_records(str(file))


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "kept", "faults"),
    [
        (
            "hh_rlhf_sample.jsonl",
            1491,
            {
                "empty_response": [58, 332, 606, 714],
                "history_differs": [804, 1080, 1258, 1260, 1318],
            },
        ),
        (
            "ultrafeedback_plain_scored.jsonl",
            293,
            {"identical_responses": [84, 171, 227, 246, 261], "empty_response": [134, 213]},
        ),
        ("templated_near_duplicates.jsonl", 40, {}),
        ("derived/trl_conversational_from_hh.jsonl", 200, {}),
        ("derived/ultrafeedback_binarized_messages.jsonl", 100, {}),
        ("llama_factory_kto_en.json", 0, {"unknown_format": list(range(60))}),
    ],
)
def test_real_files_give_the_known_faults(name: str, kept: int, faults: dict[str, list[int]]) -> None:
    assert SHARED is not None
    found: dict[str, list[int]] = {}
    for line, reason in outcomes(read_records(str(SHARED / name))):
        found.setdefault(reason, []).append(line - 1)
    assert len(found.pop("", [])) == kept
    assert found == faults
