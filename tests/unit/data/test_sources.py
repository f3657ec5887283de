"""Sources: files of every kind, patterns, folders, saved and Hub datasets; damage; identity; labels."""

import gzip
import io
import json
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.counts import DataCounts
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.files import write_records
from dpo_dist.data.read.sources import DataSource, source_labels
from dpo_dist.data.records import BadRecord, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.remedies import AtRecords
from tests.support.other_user import error_for_other_user, shared_folder
from tests.support.records import TEXT, assistant, jsonl, outcomes

LINE = json.dumps(TEXT).encode()
BOM = b"\xef\xbb\xbf"


def lines(*texts: str) -> bytes:
    return "".join(json.dumps(TEXT | {"prompt": text}) + "\n" for text in texts).encode()


def parquet(*texts: str) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist([TEXT | {"prompt": text} for text in texts]), stream)
    return stream.getvalue()


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(path: Path | str, **options: Any) -> list[tuple[int, str]]:
    return outcomes(read_records(SourceConfig(path=str(path), **options)))


def prompts(path: Path | str, **options: Any) -> list[str]:
    records = list(read_records(SourceConfig(path=str(path), **options)))
    return [str(record.prompt) for record in records if isinstance(record, PreferenceRecord)]


def refused(path: Path | str, match: str, error: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(error, match=match) as raised:
        read(path, **options)
    return str(raised.value)


LONG = LINE.replace(b"good", b"g" * 50_000)
CSV = (
    b'prompt,chosen,rejected\r\nq,"two\nlines",b\r\n\r\nq,a,b,too many\r\nq,too few\r\n'
    b'"say ""hi""",a,b\r\nq,b\xe4d,b\r\nq,' + b"a" * 200_000 + b",b\r\n"
)
# Records that follow one another on lines, of which the second is good.
DAMAGED = {
    LINE[:20]: "unparsable",
    LINE.replace(b"bad", b"\xe4"): "unparsable",
    LINE[:-1] + b', "chosen": "x"}': "unparsable",
    LINE.replace(b'"good"', b"9" * 5000): "unparsable",
    LINE.replace(b"good", b"g\\ud800"): "invalid_unicode",
    LINE[:-1] + b', "score_chosen": NaN, "score_rejected": 0}': "invalid_scores",
    b"null": "unparsable",
    b"[" * 100_000: "unparsable",
    b'{"a": ' * 2000 + b"1" + b"}" * 2000: "unparsable",
}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        *(("a.jsonl", line + b"\n" + LINE, f"1 {reason}, 2") for line, reason in DAMAGED.items()),
        ("a.jsonl", LINE.replace(b"good", "one\u2028two\x85".encode()) + b"\n" + LINE, "1, 2"),
        # Lines are those of an editor.
        ("a.jsonl", BOM + LINE + b"\n\n" + LINE + b"\r\n{\n" + LINE, "1, 3, 4 unparsable, 5"),
        ("a.jsonl", LINE.replace(b"good", b"word " * 200_000), "1"),
        ("a.json", b" [" + LINE + b', "none", 12 ,\n' + LINE + b"] ", "1, 2 unparsable, 3 unparsable, 4"),
        ("a.json", b"[" + b",".join([LONG] * 60) + b"]", ", ".join(map(str, range(1, 61)))),
        ("a.json", b"[ ]", ""),
        ("a.csv", BOM + CSV, "2, 5 unparsable, 6 missing_field, 7, 8 unparsable, 9"),
        ("a.csv", BOM + b"\n\r\n" + CSV[:40], "4"),
        ("a.csv", b",prompt,chosen,rejected,,\n0,q,a,b,,\n1,q,a,b, \n", "2, 3"),
        ("a.parquet", parquet("q", "p"), "1, 2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_records_lose_no_neighbour(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    found = read(write(tmp_path, {name: content}) / name)
    assert ", ".join(f"{line} {reason}".strip() for line, reason in found) == expected


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        *(("a.json", b"[" + LINE + end, "to its end") for end in (b",", b"", b"] {}")),
        ("a.json", b"[" + LINE.replace(b"good", b"secret\xff") + b"]", "to its end"),
        ("a.json", LINE + b"\n" + LINE, "to its end"),
        ("a.jsonl.gz", gzip.compress(lines(*map(str, range(5000))))[:-20], "to its end"),
        ("a.jsonl.zst", zstd(lines(*map(str, range(5000))))[:-20], "to its end"),
        ("a.parquet", parquet("q")[:-10], "to its end"),
        ("a.parquet", b"PAR1" + bytes(36) + parquet("q")[40:], "to its end"),
        ("a.csv", b'prompt,chosen,rejected\nq,"never closed,b\nq,a,b\n', "to its end"),
        ("a.csv", b"prompt,chosen,chosen\nq,a,b\n", "same name(.|\n)*got: +chosen\n"),
        ("a.csv", "fr\xe4ge,gut\n".encode("cp1252"), "not in UTF-8"),
        *(
            (f"a.{kind}", LINE.decode().encode("UTF-16"), match)
            for kind, match in {"json": "as UTF-8", "csv": "not in UTF-8", "tsv": "not in UTF-8"}.items()
        ),
        *((name, b"", "this kind of file") for name in ("a.parquet.gz", "a.txt")),
        ("a.png", b"", "this kind of file"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    shown = refused(write(tmp_path, {name: content}) / name, match)
    assert str(tmp_path / name) in shown
    assert "secret" not in shown


def test_a_column_of_a_table_without_a_name_is_named_by_its_place(tmp_path: Path) -> None:
    content = b",prompt,chosen,rejected,,\n0,q,yes,no,,\n1,q,yes,no,,note\n"
    first, second = read_records(str(write(tmp_path, {"a.csv": content}) / "a.csv"))
    assert isinstance(first, PreferenceRecord)
    assert isinstance(second, PreferenceRecord)
    assert (first.unread, second.unread) == (("column 1",), ("column 1", "column 6"))


def test_compressed_files_are_read(tmp_path: Path) -> None:
    rows = [TEXT | {"prompt": text} for text in ("one", "two")]
    contents = {
        "a.jsonl": lines("one", "two"),
        "a.json": json.dumps(rows).encode(),
        "a.csv": b"prompt,chosen,rejected\none,a,b\ntwo,a,b\n",
        "a.tsv": b'prompt\tchosen\trejected\none\t"a, ""b""\t\n"\tb\ntwo\ta\tb\n',
    }
    for ending, pack in ((".gz", gzip.compress), (".zst", zstd)):
        for name, content in contents.items():
            # Written in two parts, as tools that append do.
            half = len(content) // 2
            write(tmp_path, {name + ending: pack(content[:half]) + pack(content[half:])})
            assert prompts(tmp_path / (name + ending)) == ["one", "two"]


WITHOUT_END = {
    "a.jsonl": LINE + b"\n" + LINE[:-1] + b" " * 2**18 + b"}\n" + LINE,
    "a.json": b"[" + b" " * 2**18 + LINE + b"]",
    "a.csv": b"prompt,chosen,rejected\nq,a,b\nq,a," + b"b" * 2**18,
    "cells.csv": b"prompt,chosen,rejected\nq,a,b\n" + b"q," * 2**17,
    "lines.tsv": b'prompt\tchosen\trejected\nq\ta\tb\nq\ta\t"' + b"b\n" * 2**17 + b'"',
}


@pytest.mark.parametrize("name", WITHOUT_END)
def test_records_without_end_are_an_error_at_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    packed = write(tmp_path, {f"{name}.gz": gzip.compress(WITHOUT_END[name])}) / f"{name}.gz"
    assert read(packed)
    monkeypatch.setattr("dpo_dist.data.read.files.MAX_RECORD_BYTES", 2**17)
    refused(packed, "expands to more than 131,072 bytes" if name == "a.json" else "over 131,072 bytes")


@pytest.mark.slow
def test_what_expands_without_end_is_an_error_at_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, large = LINE + b"\n", parquet(*["q" * 2**12] * 64)
    write(tmp_path, {"a.jsonl.gz": gzip.compress(many * 2**15), "a.parquet": large})
    write(
        tmp_path,
        {"b.jsonl.gz": gzip.compress(b"".join(many[:-2] + b', "n": %d}\n' % n for n in range(2**15)))},
    )
    monkeypatch.setattr("dpo_dist.data.read.files.MAX_RECORD_BYTES", 2**14)
    refused(tmp_path / "a.jsonl.gz", "expands to more than")
    assert len(read(tmp_path / "b.jsonl.gz")) == 2**15
    assert len(read(tmp_path / "a.parquet")) == 64
    monkeypatch.setattr("dpo_dist.data.read.files._MAX_BATCH_BYTES", 2**14)
    refused(tmp_path / "a.parquet", "records expand to")
    monkeypatch.setattr("dpo_dist.data.read.files.MAX_RECORD_BYTES", 2**7)
    refused(tmp_path / "a.parquet", "over 128")


def test_a_record_beyond_the_bound_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_dist.data.read.reading.MAX_TEXT_BYTES", 1000)
    content = parquet("q", "q" * 1000, "p")
    assert read(write(tmp_path, {"a.parquet": content}) / "a.parquet") == [
        (1, ""),
        (2, "unparsable"),
        (3, ""),
    ]


def test_the_bound_of_texts_is_of_bytes_and_the_last_of_them_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(text: str, most: int) -> str:
        monkeypatch.setattr("dpo_dist.data.read.reading.MAX_TEXT_BYTES", most)
        file = tmp_path / "pair.jsonl"
        file.write_text(json.dumps({"prompt": text, "chosen": "a", "rejected": "b"}))
        [record] = read_records(str(file))
        return record.why if isinstance(record, BadRecord) else ""

    def size(text: str) -> int:
        return int(why(text, 1).partition("(")[2].partition(" bytes")[0])

    assert size("ä" * 100) == size("a" * 100) + 100
    assert why("ä" * 100, size("ä" * 100)) == ""
    assert why("ä" * 100, size("ä" * 100) - 1).startswith("unparsable")


def test_a_pattern_reads_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, {"b.jsonl": lines("3"), "a.jsonl": lines("1") + b"broken\n", "deep/c.jsonl": lines("4")})
    found = [str(record.origin) for record in read_records(str(tmp_path / "*.jsonl"))]
    assert found == [f"{tmp_path}/{name}" for name in ("a.jsonl:1", "a.jsonl:2", "b.jsonl:1")]
    assert read(tmp_path / "**" / "*.jsonl") == [(1, ""), (2, "unparsable"), (1, ""), (1, "")]
    assert prompts(tmp_path / "*.jsonl", limit=1) == ["1"]
    refused(tmp_path / "*.csv", "no file matches")
    write(tmp_path, {"a[1].jsonl": lines("5"), ".hidden/b.jsonl": lines("6")})
    assert prompts(tmp_path / "a[1].jsonl") == ["5"]
    for pattern in ("deep/**/*.jsonl", "deep/**", "d*/c**.jsonl"):
        assert prompts(tmp_path / pattern) == ["4"], pattern
    (tmp_path / "deep" / "again").symlink_to(tmp_path / "deep")
    for pattern in ("deep/**/*.jsonl", "deep/**/**/*.jsonl"):
        assert read(tmp_path / pattern) == [(1, "")], pattern


def test_a_folder_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = "data/test-00000-of-00001.parquet"
    shards = {f"data/train-0000{n}-of-00002.parquet": parquet(text) for n, text in ((1, "two"), (0, "one"))}
    others = {"README.md": b"# a card", "dataset_infos.json": b"{}", ".cache/x.parquet": b"none"}
    write(tmp_path / "shards", {**shards, test: parquet("3"), **others})
    assert prompts(tmp_path / "shards") == ["one", "two"]
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("shards")
    for path in ("./shards", "./link"):
        [record] = read_records(SourceConfig(path, split="test"))
        assert str(record.origin) == f"{Path(path)}/{test}:1"
    assert "test, train" in refused("./shards", "no such split", split="other")
    Path("shards/data/train-00001-of-00002.parquet").unlink()
    refused("./shards", "shards of the source are missing")


def test_the_card_of_a_folder_names_its_parts(tmp_path: Path) -> None:
    configs = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("one", "two")]
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    write(tmp_path, {"README.md": card, "one/a.jsonl": lines("1"), "two/a.jsonl": lines("2")})
    assert prompts(tmp_path, name="two") == ["2"]
    assert "one" in refused(tmp_path, "no data are found")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["some/train.jsonl", "more.jsonl"], "more.jsonl"),
        (["data/train_x-00000-of-00001.jsonl", "data/train_y-00000-of-00001.jsonl"], "train_x, train_y"),
        *((["a.jsonl", other], other) for other in ("b.csv", "b.JSONL", "b.jsonl.bz2", "below/b.tsv")),
    ],
)
def test_no_file_of_a_folder_is_ignored_in_silence(tmp_path: Path, files: list[str], match: str) -> None:
    refused(write(tmp_path, dict.fromkeys(files, lines("one"))), match)


def test_a_saved_folder_has_the_configured_split(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list([TEXT]), "test": datasets.Dataset.from_list([TEXT, TEXT])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    splits["test"].save_to_disk(tmp_path / "one")
    assert [len(read(tmp_path / "splits", split=split)) for split in (None, "test")] == [1, 2]
    assert len(read(tmp_path / "one")) == 2
    refused(tmp_path / "splits", "test, train", split="validation")
    refused(tmp_path / "one", "no such split", split="test")
    refused(tmp_path / "one", "name has no effect", ConfigError, name="x")


MIXED = [
    {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": '"q"'}] if n % 2 else f"q {n}"}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": given}]}],
        "rejected": [assistant("no")] if n % 2 else 'a "no"\n',
        "tools": [{"name": "f", "parameters": {"properties": {f"p{n}": {"type": "string"}}}}],
    }
    for n, given in enumerate(
        [{"a": {"b": [n], "c": None}} for n in range(2)] + [{"a": "[text"}, {"b": None}]
    )
]


@pytest.mark.parametrize("deep", [True, False])
def test_values_of_mixed_types_are_those_of_the_same_records_as_lines(tmp_path: Path, deep: bool) -> None:
    features = datasets.Features(dict.fromkeys(MIXED[0], datasets.Json()))
    if deep:
        call = {"name": datasets.Value("string"), "arguments": datasets.Json()}
        turn = {
            "role": datasets.Value("string"),
            "content": datasets.Json(),
            "tool_calls": datasets.List(call),
        }
        features |= {"chosen": datasets.List(turn), "tools": datasets.LargeList(datasets.Json())}
        features |= {"prompt": datasets.List({"role": datasets.Value("string"), "content": datasets.Json()})}
    table = datasets.Dataset.from_list(MIXED, features=datasets.Features(features))
    (tmp_path / "folder/data").mkdir(parents=True)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_parquet(tmp_path / "folder/data/train-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    lines = jsonl(tmp_path, *MIXED)
    in_memory = write_records(table, tmp_path / "memory", "data.train")
    expected = [replace(record, origin=Origin("", 0)) for record in read_records(lines)]
    assert all(isinstance(record, PreferenceRecord) for record in expected), expected
    for path in (tmp_path / "a.parquet", tmp_path / "folder", tmp_path / "saved", in_memory):
        found = read_records(SourceConfig(path=str(path)))
        assert [replace(record, origin=Origin("", 0)) for record in found] == expected, path


LABELLED = {"prompt": "q", "completion": "a"}


OPPOSITES = (
    "correct/incorrect yes/no positive/negative like/dislike helpful/unhelpful safe/unsafe accept/reject "
    "chosen/rejected good/bad true/false right/wrong pos/neg Thumbs-Up/thumbs_down pass/fail"
)


@pytest.mark.parametrize("names", [names.split("/") for names in OPPOSITES.split()])
def test_the_name_of_a_label_decides_not_its_number(tmp_path: Path, names: list[str]) -> None:
    rows = [LABELLED | {"label": name, "nested": {"labels": [name]}} for name in names]
    table = datasets.Dataset.from_list(rows).class_encode_column("label")
    features = table.features | {"nested": {"labels": datasets.List(table.features["label"])}}
    table = table.cast(datasets.Features(features))
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    words = jsonl(tmp_path, *rows)
    for path in (
        tmp_path / "a.parquet",
        tmp_path / "saved",
        write_records(table, tmp_path, "data.train"),
        words,
    ):
        for label in ("label", "nested.labels[0]"):
            fields = {"prompt": "prompt", "completion": "completion", "label": f"{label} == '{names[0]}'"}
            found = read_records(SourceConfig(str(path), fields=fields, ignore=["label"]))
            assert [record.scores for record in found] == [(1,), (0,)]  # type: ignore[union-attr]


def test_a_missing_verdict_is_no_bad_label_and_no_side(tmp_path: Path) -> None:
    rows = [LABELLED | {"verdict": verdict, "other": "no"} for verdict in ("GOOD", None, "BAD")]
    sides = {"chosen": "completion if verdict == 'GOOD' else other", "rejected": "other ~ '!'"}
    for fields in ({"completion": "completion", "label": "verdict == 'GOOD'"}, sides):
        source = SourceConfig(
            str(jsonl(tmp_path, *rows)), fields={"prompt": "prompt", **fields}, ignore=["*"]
        )
        found = list(read_records(source))
        assert [getattr(record, "reason", "") for record in found][1] == "expression_failed"
    kept = {"prompt": "prompt", "completion": "completion", "keep": "verdict == 'GOOD'"}
    found = list(read_records(SourceConfig(str(jsonl(tmp_path, *rows)), fields=kept, ignore=["*"])))
    assert [getattr(record, "reason", "") for record in found] == ["", "not_kept", "not_kept"]


@pytest.mark.parametrize("scores", [5, 0, [1, 2, 3], "2"])
def test_scores_of_a_pair_are_two(tmp_path: Path, scores: Any) -> None:
    row = {"p": "q", "c": "good", "r": "bad", "s": scores}
    fields = {"prompt": "p", "chosen": "c", "rejected": "r", "scores": "s"}
    [record] = read_records(SourceConfig(str(jsonl(tmp_path, row)), fields=fields))
    assert getattr(record, "reason", "") == "invalid_scores"


def test_an_error_lists_labels_that_it_does_not_know_and_its_line_reads_them(tmp_path: Path) -> None:
    names = ["awful", "awful", "awful", "awful", "splendid"]
    table = datasets.Dataset.from_list([LABELLED | {"label": name} for name in names])
    table.class_encode_column("label").to_parquet(file := tmp_path / "a.parquet")
    with pytest.raises(DataError) as raised:
        DataSource(SourceConfig(str(file))).check(DataConfig())
    assert "label: text (awful, splendid)" in raised.value.got
    line = raised.value.remedy.split("data.train=")[1].splitlines()[0].replace("GOOD", "splendid")
    [source] = load_run_config(["model.path=m", shlex.split(f"data.train={line}")[0]]).data.train
    assert [record.scores for record in read_records(source)] == [*[(0,)] * 4, (1,)]  # type: ignore[union-attr]


def test_names_of_labels_beside_lists_of_older_datasets_are_read(tmp_path: Path) -> None:
    label = {"names": ["correct", "incorrect"], "_type": "ClassLabel"}
    text = {"dtype": "string", "_type": "Value"}
    for lists in ([{"text": text}], {"feature": [text], "_type": "Sequence"}, [[label]]):
        features = {"info": {"features": {"lists": lists, "label": label}}}
        table = pa.Table.from_pylist([LABELLED | {"label": 1}])
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pyarrow.parquet.write_table(table, file := tmp_path / "a.parquet")
        fields = {"prompt": "prompt", "completion": "completion", "label": "label == 'correct'"}
        found = read_records(SourceConfig(str(file), fields=fields))
        assert [record.scores for record in found] == [(0,)]  # type: ignore[union-attr]


@pytest.mark.parametrize("text", [b"[", b"[]", b'{"info": {"features": {"label": {"names": 3}}}}'])
def test_descriptions_of_labels_that_are_none_are_not_read(tmp_path: Path, text: bytes) -> None:
    table = pa.Table.from_pylist([LABELLED | {"label": 1}]).replace_schema_metadata({"huggingface": text})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(1, "")]


def test_a_dataset_in_memory_is_read_as_its_user_sees_it(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([TEXT | {"messages": "none"}])
    table.set_format(columns=[*TEXT])
    path = write_records(table, tmp_path, "data.train")
    assert json.loads(path.read_text()) == TEXT
    table.set_transform(lambda batch: {"prompt": ["other"], "chosen": ["a"], "rejected": ["b"]})
    assert prompts(write_records(table, tmp_path, "data.train")) == ["other"]


def test_json_in_columns_of_types_that_pyarrow_does_not_know(tmp_path: Path) -> None:
    named = {"ARROW:extension:name": "google:sqlType:json"}
    fields = [pa.field(name, pa.string(), metadata=named) for name in TEXT]
    rows = [{name: json.dumps(text) for name, text in TEXT.items()}, dict.fromkeys(TEXT, "[secret")]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), tmp_path / "a.parquet")
    [good, bad] = read_records(str(tmp_path / "a.parquet"))
    responses = pa.list_(pa.field("item", pa.string(), metadata=named))
    schema = pa.schema({**dict.fromkeys(LABELLED, pa.string()), "responses": responses})
    pyarrow.parquet.write_table(pa.Table.from_pylist([LABELLED], schema), tmp_path / "null.parquet")
    assert read(tmp_path / "null.parquet") == [(1, "")]
    assert isinstance(good, PreferenceRecord)
    assert (good.prompt, good.responses) == ("q", ("good", "bad"))
    assert str(bad).endswith(
        "a.parquet:2 unparsable (JSON in a column: Expecting value: line 1 column 2 (char 1))"
    )


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json"])
def test_a_saved_folder_names_no_files_outside(tmp_path: Path, file: str) -> None:
    saved = datasets.Dataset.from_list([TEXT])
    saved.save_to_disk(tmp_path / "private")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "given")
    if file == "state.json":
        state = json.loads((tmp_path / "given/train/state.json").read_bytes())
        state["_data_files"][0]["filename"] = f"../../private/{state['_data_files'][0]['filename']}"
        (tmp_path / "given/train/state.json").write_text(json.dumps(state))
    else:
        (tmp_path / "given/dataset_dict.json").write_text('{"splits": ["../private"]}')
    if file == "state.json":
        assert len(read(tmp_path / "given")) == 1
    else:
        refused(tmp_path / "given", "no such split", split="../private")


def test_the_identity_depends_on_content_not_on_path(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, {"a.jsonl": lines("one")}) for name in ("one", "two"))

    def identity(path: Path) -> str:
        return DataSource(SourceConfig(str(path))).content_identity()

    assert identity(first) == identity(second)
    pattern = identity(tmp_path / "*" / "a.jsonl")
    write(second, {"b.jsonl": lines("two")})
    assert identity(first) != identity(second)
    write(second, {"a.jsonl": lines("other")})
    assert identity(tmp_path / "*" / "a.jsonl") != pattern


NO_SIDE, OTHER = (json.dumps(one).encode() + b"\n" for one in (TEXT | {"rejected": None}, {"x": "a"}))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        # Sorted data may begin with records that are dropped.
        (NO_SIDE * 100 + b"{\n" * 100 + lines("q"), None),
        (NO_SIDE * 100, "100 of 100 records cannot be used"),
    ],
)
def test_a_source_without_a_record_that_can_be_used_is_refused(
    tmp_path: Path, content: bytes, match: str | None
) -> None:
    source = SourceConfig(str(write(tmp_path, {"a.jsonl": content}) / "a.jsonl"))
    config = DataConfig()
    if match is None:
        DataSource(source).check(config)
        return
    with pytest.raises(DataError, match=match):
        DataSource(source).check(config)


def counts_of(file: Path) -> DataCounts:
    counts = DataCounts()
    for record in read_records(SourceConfig(str(file))):
        counts.add(record)
    return counts


def test_of_records_dropped_for_one_reason_one_is_named_whatever_their_file_is_called(
    tmp_path: Path,
) -> None:
    name = "2026:12 ; pairs.jsonl"
    file = write(tmp_path, {name: b"{\n" * 2 + lines("q") + NO_SIDE}) / name
    with pytest.raises(DataError, match="3 of 4 records cannot be used") as caught:
        counts_of(file).check(str(file), DataConfig())
    assert isinstance(caught.value.where, AtRecords)
    first, last = caught.value.where.records
    assert caught.value.where == f"{first}; {last}"
    assert first.startswith(f"{file}:1 unparsable")
    assert last.startswith(f"{file}:4 ")


def test_an_error_about_a_whole_source_names_its_key_too() -> None:
    with pytest.raises(DataError, match="no records") as caught:
        DataCounts().check("a.jsonl", DataConfig(), key="data.train[0]")
    assert caught.value.where == "data.train[0]: a.jsonl"


SPLITS = [
    ({"left_in_train": 9}, DataConfig(eval_share=0.01), "raise data.eval_share"),
    ({"held_out_for_eval": 9}, DataConfig(eval_share=0.99), "lower data.eval_share"),
    (
        {"held_out_for_eval": 9},
        DataConfig(eval=[SourceConfig("a.jsonl")], drop_eval_prompts=True),
        "set data.drop_eval_prompts=false",
    ),
]


@pytest.mark.parametrize(("changed", "config", "to_do"), SPLITS)
def test_a_split_without_records_on_one_side_says_what_to_change(
    changed: dict[str, int], config: DataConfig, to_do: str
) -> None:
    with pytest.raises(DataError) as caught:
        DataCounts(changed=Counter(changed)).check_split(config)
    assert caught.value.remedy.startswith(to_do)


@pytest.mark.parametrize("escape", ["../outside.jsonl", "{}/outside.jsonl", "file://{}/outside.jsonl"])
def test_the_card_of_a_hub_dataset_names_own_files(
    escape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = json.dumps([{"split": "train", "path": escape.format(tmp_path)}])
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {names}\n---\n"
    write(tmp_path, {"outside.jsonl": LINE, "snapshot/README.md": card.encode()})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **_options: f"{tmp_path}/snapshot")
    refused("org/set", "names a file outside its folder")


def test_the_script_of_a_hub_dataset_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"from pathlib import Path\nPath({str(tmp_path / 'trace')!r}).touch()"
    write(tmp_path, {"snapshot/snapshot.py": script.encode()})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **_options: f"{tmp_path}/snapshot")
    refused("org/set", "no data are found")
    assert not (tmp_path / "trace").exists()


of = SourceConfig


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        ([of("/data/math.jsonl")], "math"),
        ([of("org/ultrafeedback_binarized"), of("/data/hh.jsonl.gz")], "ultrafeedback_binarized hh"),
        ([of("/data/hh/train.jsonl"), of("/data/uf/train.jsonl")], "hh-train uf-train"),
        ([of("/data/hh/*.jsonl"), of("/data/hh/**/part-*.parquet")], "hh part"),
        ([of("/my pairs (new).jsonl"), of("folder/"), of("データ/選択.jsonl")], "my-pairs-new folder 選択"),
        ([of("a.jsonl"), of("b/a.jsonl"), of("b/a.csv"), of("a-2")], "a a-2 a-3 a-2-2"),
        ([of("o/d", split="a"), of("o/d", split="b"), of("o/d", split="b", weight=2.0)], "d-a d-b d-b-2"),
        ([of("o/d", name="en"), of("o/set")], "d-en set"),
        ([of("o/d", data_dir="en", split="a"), of("o/d", data_dir="fr", split="a")], "d-en-a d-fr-a"),
        ([of("a/p.csv", label="math"), of("b/p.csv", label="math"), of("math.csv")], "math math math-2"),
    ],
)
def test_labels_by_hand(sources: list[SourceConfig], labels: str) -> None:
    assert source_labels(sources) == labels.split()


@pytest.mark.parametrize("closed", ["a/1.jsonl", "a", ""])
@pytest.mark.parametrize("path", ["a/1.jsonl", "a", "*/*.jsonl", "a/*.jsonl", "a/none.jsonl"])
def test_what_this_user_may_not_read_is_not_said_to_be_missing(path: str, closed: str) -> None:
    with shared_folder() as folder:
        (folder / "a").mkdir()
        for name in ("a/1.jsonl", "b.jsonl"):
            (folder / name).write_text(json.dumps(TEXT))
        if not (folder / path).is_file() and "*" not in path and closed.endswith(".jsonl"):
            return  # the file is not named
        (folder / closed).chmod(0)
        error = error_for_other_user(lambda: DataSource(SourceConfig(f"{folder}/{path}".rstrip("/"))).check())
        (folder / closed).chmod(0o755)
    assert "this user may not read" in error
    assert f"{folder}/{closed}".rstrip("/") + ", as user" in error


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "*/*.jsonl"])
def test_a_folder_below_that_may_not_be_read_is_not_left_out(pattern: str) -> None:
    with shared_folder() as folder:
        (folder / "a").mkdir()
        for name in ("a/1.jsonl", "b.jsonl"):
            (folder / name).write_text(json.dumps(TEXT))
        (folder / "a").chmod(0)
        error = error_for_other_user(lambda: DataSource(SourceConfig(f"{folder}/{pattern}")).check())
    assert "this user may not read" in error
