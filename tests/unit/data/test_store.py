"""The cache of encoded sources: found by content, encoded once, verified, never incomplete."""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from dpo_dist.config.data import DataConfig, DataFormat, OnBadRecord, Ranked, SourceConfig, Truncation
from dpo_dist.data import build as build_dataset_module
from dpo_dist.data import encode as encode_chunk_module
from dpo_dist.data import store as store_module
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.data.read import Meter
from dpo_dist.data.records import Origin, PreferenceRecord
from dpo_dist.foundation import files as digests_module
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support import tiny
from tests.support.cache import encoded_folders, opened, prepare, prepare_all
from tests.support.records import jsonl

GOOD = [
    {"prompt": f"question {n}", "chosen": f"right {n}", "rejected": f"wrong {n}" * n} for n in range(1, 8)
]
BAD = {"prompt": "q", "chosen": "same", "rejected": "same"}


def files(folder: Path, *parts: list[Any]) -> list[str]:
    """Write each part of the records to a folder of its own."""
    for number in range(len(parts)):
        (folder / str(number)).mkdir()
    return [jsonl(folder / str(number), *rows) for number, rows in enumerate(parts)]


def contents(data: PreferenceDataset) -> list[list[list[int]]]:
    pairs = map(data.sequences, range(len(data)))
    return [[ids.tolist() for ids in (pair.prompt_ids, *pair.responses)] for pair in pairs]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of all records that are encoded."""
    seen: list[str] = []
    encode_one = encode_chunk_module.encode_pair

    def spy(record: PreferenceRecord, *rest: Any) -> Any:
        seen.append(str(record.prompt))
        return encode_one(record, *rest)

    monkeypatch.setattr(encode_chunk_module, "encode_pair", spy)
    return seen


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 30},
        {"max_prompt_length": 5},
        {"truncation": Truncation.drop},
        {"text_as_messages": True},
        {"on_bad_record": OnBadRecord.error},
        {"tokenizer_digest": "another"},
    ],
    ids=str,
)
def test_every_input_of_the_ids_changes_the_folder_and_nothing_else(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = jsonl(tmp_path, *GOOD)
    folder = prepare(tmp_path, path)
    assert prepare(tmp_path, path, **change) != folder
    assert prepare(tmp_path, path, max_bad_share=0.5) == folder


def test_format_split_and_kind_change_the_fingerprint(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *GOOD)
    assert prepare(tmp_path, path) != prepare(tmp_path, SourceConfig(path, format=DataFormat.text))
    saved = str(tmp_path / "saved")
    of_splits = {"train": Dataset.from_list(GOOD), "test": Dataset.from_list(GOOD[:2])}
    DatasetDict(of_splits).save_to_disk(saved)
    lengths = [len(opened(tmp_path, SourceConfig(saved, split=split))) for split in (None, "test", "train")]
    assert lengths == [7, 2, 7]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(GOOD))
    assert len(opened(tmp_path, str(array))) == 7
    with pytest.raises(DataError, match="no record can be used"):
        opened(tmp_path, str(array.rename(tmp_path / "array.jsonl")))


def test_columns_change_the_fingerprint_and_the_file_of_an_entry_does_not(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "question"}]
    path = jsonl(
        tmp_path,
        *({"conversations": turns} | {side: one[side] for side in ("chosen", "rejected")} for one in GOOD),
    )
    sources = [SourceConfig(path), SourceConfig(path, columns={"rejected": "rejected"})]
    assert len({prepare(tmp_path, source) for source in sources}) == 2
    entry = {"file_name": "records.jsonl", "ranking": True, "formatting": "alpaca"}
    places = files(tmp_path, *[[{"instruction": "q", **record} for record in GOOD]] * 2)
    for place in map(Path, places):
        (place.parent / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    here, there = (SourceConfig(str(Path(place).parent), name="mine") for place in places)
    assert prepare(tmp_path, here) == prepare(tmp_path, there)


def file_of(folder: Path, kind: str) -> Path:
    [file] = folder.glob(f"*.{kind}")
    return file


def flip_a_bit(folder: Path) -> None:
    """Damage as by a disk: size and times of the file do not change."""
    file = file_of(folder, "arrow")
    times, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(file_of(folder, "arrow"), 500),
    "lost": lambda folder: file_of(folder, "arrow").unlink(),
    "no manifest": lambda folder: file_of(folder, "json").unlink(),
    "broken manifest": lambda folder: file_of(folder, "json").write_text('{"sizes"'),
    "flipped": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_are_not_opened_and_are_encoded_again(damage: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, *GOOD)
    [source] = prepare_all(tmp_path, path)
    whole = bytes_of(source.folder)
    DAMAGES[damage](source.folder)
    with pytest.raises(DataError, match="damaged"):
        open_dataset([source], DataConfig())
    assert prepare(tmp_path, path) == source.folder
    assert bytes_of(source.folder) == whole
    assert encoded_folders(tmp_path) == [source.folder.name]


def test_an_interrupted_write_leaves_nothing_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path, *GOOD)

    def killed(_source: SourceConfig, _meter: Meter) -> Iterator[PreferenceRecord]:
        yield PreferenceRecord("q", ("right", "wrong"), Origin("here", 1))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_dataset_module, "read_records", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, path)
    assert encoded_folders(tmp_path) == []
    assert len(opened(tmp_path, path)) == len(GOOD)


def test_a_source_is_encoded_once_for_all_lists(tmp_path: Path, encodes: list[str]) -> None:
    """Other lists, limits, weights, orders and paths encode nothing again and have the same examples."""
    first, second = files(tmp_path, GOOD[:3], GOOD[3:])
    one, two = contents(opened(tmp_path, first)), contents(opened(tmp_path, second))
    encodes.clear()
    shutil.copytree(tmp_path / "0", tmp_path / "elsewhere")
    moved = str(tmp_path / "elsewhere/records.jsonl")
    both = opened(tmp_path, first, second)
    assert contents(both) == one + two
    assert opened(tmp_path, moved, second).fingerprint == both.fingerprint
    assert opened(tmp_path, second, first).fingerprint != both.fingerprint
    assert contents(opened(tmp_path, second, moved, first)) == two + one + one
    part = opened(tmp_path, SourceConfig(first, weight=2.0), SourceConfig(second, limit=2))
    assert contents(part) == one + two[:2]
    assert contents(opened(tmp_path, SourceConfig(moved, limit=100))) == one
    assert encodes == []
    assert opened(tmp_path, second, moved).origin(5) == Origin(moved, 2)


def test_a_limit_reads_its_records_only_and_covers_lower_limits(tmp_path: Path, encodes: list[str]) -> None:
    path = jsonl(tmp_path, *GOOD)
    five = opened(tmp_path, SourceConfig(path, limit=5))
    assert contents(opened(tmp_path, SourceConfig(path, limit=3))) == contents(five)[:3]
    assert len(encodes) == 5
    assert len(opened(tmp_path, SourceConfig(path, limit=50))) == 7
    assert contents(opened(tmp_path, path))[:5] == contents(five)
    assert len(encodes) == 12


def test_a_limited_view_counts_its_own_records(tmp_path: Path) -> None:
    ranking = {"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [3, 2, 2, 1]}
    path = jsonl(tmp_path, GOOD[0], BAD, "no object", ranking, {**GOOD[1], "chosen": "long " * 50}, BAD)
    how = {"max_bad_share": 1.0, "ranked": Ranked.all_pairs, "max_length": 100}
    assert len(opened(tmp_path, path, **how)) == 7
    for limit in range(1, 7):
        (tmp_path / str(limit)).mkdir()
        source = SourceConfig(path, limit=limit)
        seen, alone = opened(tmp_path, source, **how), opened(tmp_path / str(limit), source, **how)
        assert (seen.counts, contents(seen)) == (alone.counts, contents(alone))
        for name in ("keys", "origins", "scores"):
            np.testing.assert_array_equal(getattr(seen, name), getattr(alone, name))


@pytest.mark.parametrize("batch_bytes", [1, 2**24])
def test_examples_of_several_sources_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    """Rankings of several sizes over three sources: ids, keys, response indices, sizes and origins."""
    monkeypatch.setattr(build_dataset_module, "CHUNK_RECORDS", 2)
    monkeypatch.setattr(store_module, "_BATCH_BYTES", batch_bytes)

    def row(number: int) -> dict[str, Any]:
        responses = [f"answer {n} " * (n + 1) for n in range(2 + number % 3)]
        return {"prompt": f"question {number}", "responses": responses}

    parts = [list(map(row, range(start, start + 4))) for start in (0, 4, 8)]
    paths = files(tmp_path, *parts)
    whole = opened(tmp_path, jsonl(tmp_path, *itertools.chain(*parts)), ranked=Ranked.all_pairs)
    data = opened(tmp_path, *paths, ranked=Ranked.all_pairs)
    every = np.arange(len(whole))
    assert contents(data) == contents(whole)
    indices = data.response_indices(every[::-1])
    assert indices.tolist() == whole.response_indices(every[::-1]).tolist()
    np.testing.assert_array_equal(data.keys, whole.keys)
    for found, expected in zip(data.locate_responses(indices), whole.locate_responses(indices), strict=True):
        assert found.tolist() == expected.tolist()
    assert [data.lengths(row) for row in every] == [whole.lengths(row) for row in every]
    assert data.mean_chosen_tokens(every) == whole.mean_chosen_tokens(every)
    lines = {(origin.source, origin.line) for origin in map(data.origin, every)}
    assert lines == {(file, line) for file in paths for line in range(1, 5)}


@pytest.mark.parametrize("put_back", [False, True], ids=["replaced", "replaced and put back"])
def test_files_replaced_while_they_are_read_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_back: bool
) -> None:
    path = Path(jsonl(tmp_path, *GOOD))
    read = build_dataset_module.read_records

    def overtaken(source: SourceConfig, _meter: Meter) -> Iterator[Any]:
        path.rename(tmp_path / "aside")
        jsonl(tmp_path, *GOOD[:3])
        records = list(read(source))
        if put_back:
            (tmp_path / "aside").rename(path)
        return iter(records)

    monkeypatch.setattr(build_dataset_module, "read_records", overtaken)
    with pytest.raises(DataError, match="changed while they were read"):
        prepare(tmp_path, str(path))
    assert encoded_folders(tmp_path) == []


def test_a_full_disk_is_an_error_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_file = pa.OSFile
    monkeypatch.setattr(pa, "OSFile", lambda _path, mode: opened_file("/dev/full", mode))
    with pytest.raises(ConfigError, match="the encoded data cannot be written") as caught:
        prepare(tmp_path, jsonl(tmp_path, *GOOD))
    assert caught.value.where == "data.cache"
    assert not encoded_folders(tmp_path)


def test_a_start_reads_no_unchanged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path, *GOOD)
    prepare(tmp_path, path)
    monkeypatch.setattr(digests_module, "content_digest", lambda files: pytest.fail(f"{files} read again"))
    assert len(opened(tmp_path, path)) == 7


def test_a_renamed_folder_is_not_used(tmp_path: Path) -> None:
    one, other = files(tmp_path, GOOD[:3], GOOD[3:])
    folder, elsewhere = prepare(tmp_path, one), prepare(tmp_path, other)
    shutil.rmtree(folder)
    shutil.copytree(elsewhere, folder)
    assert len(opened(tmp_path, one)) == 3


def test_progress_has_each_source_with_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is encoded already shows none; with a limit the share is that of the limit."""
    monkeypatch.setattr(build_dataset_module, "CHUNK_RECORDS", 2)
    seen: dict[str, list[tuple[int, float | None]]] = {}

    @contextlib.contextmanager
    def progress(source: str) -> Iterator[Callable[[int, float | None], None]]:
        shares = seen.setdefault(source, [])
        yield lambda records, share: shares.append((records, share))

    one, other = files(tmp_path, GOOD[:3], GOOD[3:])
    config = DataConfig(cache=str(tmp_path / "cache"))
    sources = [SourceConfig(one), SourceConfig(other, limit=2), SourceConfig(one)]
    build_dataset_module.prepare_dataset(sources, config, tiny.qwen(), "qwen", progress)
    assert list(seen) == [one, other]
    assert [records for records, _ in seen[one]] == [2, 1]
    assert seen[one][-1][1] == 1.0
    assert seen[other] == [(2, 1.0)]


def test_each_response_that_was_cut_is_marked_and_counted_by_side(tmp_path: Path) -> None:
    short, long = "a", "b" * 400
    pairs = [(short, "c"), (long, short), (short, long)]
    rows = [{"prompt": "q", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    rows += [{"prompt": "q", "responses": [short, "c", long]}, {"prompt": "q", "completion": long}]
    path = jsonl(tmp_path, *rows)
    data = opened(tmp_path, path, max_length=64, ranked=Ranked.all_pairs)
    marks = [data.truncated[data.response_indices(np.array([index]))].tolist() for index in range(len(data))]
    assert marks == [[False] * 2, [True, False], [False, True], [False] * 2, *([[False, True]] * 2), [True]]
    sides = {"prompt": 0, "response": 4, "chosen": 1, "rejected": 2}
    assert {side: data.counts[f"{side}_truncated"] for side in sides} == sides
    dropped = opened(tmp_path, path, max_length=64, truncation=Truncation.drop, max_bad_share=1.0)
    assert dropped.counts["dropped"] == {"too_long": 4}
    assert not dropped.truncated.any()
