"""Sources of several files: patterns, folders of shards, compression, damage."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.data.sources import source_identity
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support.records import TEXT, jsonl


def row(text: str) -> dict[str, str]:
    return TEXT | {"prompt": text}


def lines(*texts: str) -> bytes:
    return "".join(json.dumps(row(text)) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def parquet(file: Path, *texts: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist([row(text) for text in texts]), file)


def prompts(path: Path | str, **options: object) -> list[str]:
    records = list(read_records(SourceConfig(path=str(path), **options)))  # type: ignore[arg-type]
    assert all(isinstance(record, PreferenceRecord) for record in records)
    return [str(record.prompt) for record in records if isinstance(record, PreferenceRecord)]


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_compressed_files_are_read_by_their_inner_extension(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    ending = ".gz" if pack is gzip.compress else ".zst"
    contents = {
        "a.jsonl": lines("one", "two"),
        "a.json": json.dumps([row("one"), row("two")]).encode(),
        "a.csv": b"prompt,chosen,rejected\none,a,b\ntwo,a,b\n",
    }
    for name, content in contents.items():
        # Written in two parts, as tools that append do.
        half = len(content) // 2
        write(tmp_path / (name + ending), pack(content[:half]) + pack(content[half:]))
        assert prompts(tmp_path / (name + ending)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(lines(*map(str, range(5000))))[:-20]),
        ("a.jsonl.zst", zstd(lines(*map(str, range(5000))))[:-20]),
        ("a.jsonl.gz", b"no gzip"),
        ("a.csv.zst", b"no zstd"),
        ("a.parquet.gz", b""),
        ("a.gz", b""),
    ],
)
def test_damaged_compression_is_one_error(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path / name, content)
    with pytest.raises(DataError) as raised:
        list(read_records(str(tmp_path / name)))
    assert raised.value.where == str(tmp_path / name)


def test_a_pattern_reads_files_in_order_with_their_line_numbers(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", lines("three"))
    write(tmp_path / "a.jsonl", lines("one") + b"broken\n" + lines("two"))
    write(tmp_path / "deep" / "c.jsonl", lines("four"))
    records = list(read_records(str(tmp_path / "*.jsonl")))
    assert [(str(record.origin), isinstance(record, BadRecord)) for record in records] == [
        (f"{tmp_path}/a.jsonl:1", False),
        (f"{tmp_path}/a.jsonl:2", True),
        (f"{tmp_path}/a.jsonl:3", False),
        (f"{tmp_path}/b.jsonl:1", False),
    ]
    write(tmp_path / "a.jsonl", lines("one"))
    assert prompts(tmp_path / "**" / "*.jsonl") == ["one", "three", "four"]
    assert prompts(tmp_path / "*.jsonl", limit=1) == ["one"]
    with pytest.raises(DataError, match="no file matches"):
        read_records(str(tmp_path / "*.csv"))


def test_a_pattern_does_not_follow_links_to_folders(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a.jsonl", lines("one"))
    write(tmp_path / ".hidden" / "b.jsonl", lines("two"))
    for name in ("first", "second"):
        (tmp_path / "deep" / name).symlink_to(tmp_path, target_is_directory=True)
    for pattern in ("**/*.jsonl", "**", "d*/a**.jsonl"):
        assert prompts(tmp_path / pattern) == ["one"], pattern


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "a[1].jsonl", lines("one"))
    assert prompts(tmp_path / "a[1].jsonl") == ["one"]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-0000{n}-of-00002.parquet", "data/test-00000-of-00001.parquet"),
        ("train/part{n}.parquet", "test/part0.parquet"),
        ("set/my_train_{n}.parquet", "set/my_eval.parquet"),
    ],
)
def test_a_downloaded_folder_of_shards_is_read_split_by_split(tmp_path: Path, train: str, test: str) -> None:
    parquet(tmp_path / train.format(n=1), "two")
    parquet(tmp_path / train.format(n=0), "one")
    parquet(tmp_path / test, "held out")
    write(tmp_path / "README.md", b"# a card")
    write(tmp_path / "dataset_infos.json", b"{}")
    write(tmp_path / ".cache" / "huggingface" / "x.parquet", b"no parquet")
    assert prompts(tmp_path) == ["one", "two"]
    assert prompts(tmp_path, split="test") == ["held out"]
    with pytest.raises(DataError, match="no such split") as raised:
        read_records(SourceConfig(path=str(tmp_path), split="other"))
    assert raised.value.expected == "test, train"


def test_splits_of_any_name_follow_from_shard_names(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "train_prefs-00000-of-00001.parquet", "prefs")
    parquet(tmp_path / "data" / "train_sft-00000-of-00001.parquet", "sft")
    assert prompts(tmp_path, split="train_prefs") == ["prefs"]
    with pytest.raises(DataError, match="train_prefs, train_sft"):
        read_records(str(tmp_path))


def test_no_file_of_a_folder_is_silently_ignored(tmp_path: Path) -> None:
    write(tmp_path / "some" / "train.jsonl", lines("one"))
    write(tmp_path / "some" / "more.jsonl", lines("two"))
    with pytest.raises(DataError, match="names of some files have no split") as raised:
        read_records(str(tmp_path / "some"))
    assert raised.value.got == "more.jsonl"
    for number in (0, 2):
        write(tmp_path / "cut" / f"train-{number:05d}-of-00003.jsonl", lines("one"))
    with pytest.raises(DataError, match="shards of the source are missing") as raised:
        read_records(str(tmp_path / "cut"))
    assert "train-00001-of-00003" in raised.value.got
    write(tmp_path / "cut" / "train-00001-of-00003.jsonl", lines("two"))
    assert prompts(tmp_path / "cut") == ["one", "two", "one"]


def test_a_folder_of_files_without_splits_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", lines("two"))
    write(tmp_path / "a.jsonl.gz", gzip.compress(lines("one")))
    assert prompts(tmp_path) == ["one", "two"]
    with pytest.raises(ConfigError, match="split"):
        read_records(SourceConfig(path=str(tmp_path), split="train"))


def test_the_error_of_an_unreadable_folder_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        read_records(str(tmp_path / "empty"))
    write(tmp_path / "mixed" / "a.json", b"[]")
    write(tmp_path / "mixed" / "a.jsonl", lines("one"))
    with pytest.raises(DataError, match="several kinds") as raised:
        read_records(str(tmp_path / "mixed"))
    assert "a.json, a.jsonl" in raised.value.got
    write(tmp_path / "half" / "state.json", b"{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        read_records(str(tmp_path / "half"))


@pytest.mark.parametrize(
    "path", ["https://example.org/a.jsonl", "s3://bucket/a.parquet", "hf://datasets/o/n"]
)
def test_urls_are_refused(path: str) -> None:
    for ask in (read_records, lambda source: source_identity(SourceConfig(source))):
        with pytest.raises(DataError, match="URLs cannot be read"):
            ask(path)  # type: ignore[operator]


@pytest.mark.parametrize("option", ["name", "data_dir", "revision"])
def test_hub_options_of_a_file_are_refused(tmp_path: Path, option: str) -> None:
    path = jsonl(tmp_path, TEXT)
    with pytest.raises(ConfigError, match=option):
        read_records(SourceConfig(path=path, **{option: "x"}))  # type: ignore[arg-type]


def test_the_identity_depends_on_content_not_on_path(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.jsonl", lines("one"))
    write(tmp_path / "two" / "a.jsonl", lines("one"))
    first, second = (SourceConfig(str(tmp_path / folder)) for folder in ("one", "two"))
    assert source_identity(first) == source_identity(second)
    write(tmp_path / "two" / "b.jsonl", lines("two"))
    assert source_identity(first) != source_identity(second)
    pattern = SourceConfig(str(tmp_path / "*" / "a.jsonl"))
    before = source_identity(pattern)
    write(tmp_path / "two" / "a.jsonl", lines("other"))
    assert source_identity(pattern) != before


def test_a_duplicate_key_makes_a_record_bad(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write(file, b'{"prompt": "q", "chosen": "good", "chosen": "bad", "rejected": "x"}\n' + lines("one"))
    bad, good = read_records(str(file))
    assert isinstance(bad, BadRecord)
    assert (bad.reason, "chosen twice" in bad.detail) == ("unparsable", True)
    assert isinstance(good, PreferenceRecord)


@pytest.mark.parametrize(
    "path", ["x" * 300, "a/" + "b" * 5000 + ".jsonl", "a\0b.jsonl", '{"prompt": "' + "y" * 300]
)
def test_what_cannot_be_a_path_is_an_error(path: str) -> None:
    with pytest.raises(DataError, match="path cannot be opened") as raised:
        read_records(path)
    assert "yyy" not in str(raised.value)


def test_what_is_no_file_is_not_said_to_be_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "absent.jsonl")
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    for path, words in (
        (tmp_path / "pipe.jsonl", "neither a file nor a folder"),
        (Path("/dev/null"), "neither a file nor a folder"),
        (tmp_path / "link.jsonl", "a link to"),
        (tmp_path / "circle.jsonl", "cannot be opened"),
    ):
        with pytest.raises(DataError, match=words):
            read_records(str(path))


@pytest.mark.parametrize("name", ["b.JSONL", "b.jsonl.bz2", "b.tsv", "below/b.ndjson"])
def test_a_folder_with_data_files_that_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    assert len(list(read_records(str(tmp_path)))) == 1
    (tmp_path / name).write_bytes(lines("b"))
    with pytest.raises(DataError, match=name):
        read_records(str(tmp_path))
