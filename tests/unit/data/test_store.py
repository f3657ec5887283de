"""The cache of encoded sources: found by content, encoded once, verified, never incomplete."""

import itertools
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from dpo_dist.data import encode as encode_module
from dpo_dist.data.config import DataConfig, Ranked, SourceConfig, Truncation
from dpo_dist.data.read.sources import DataSource
from dpo_dist.data.records import Origin
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.foundation import files as digests_module
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support.cache import encoded_folders, opened, prepare, prepare_all
from tests.support.records import GOOD, jsonl

pytestmark = pytest.mark.slow

FIELDS = ("prompt", "chosen", "rejected")


def contents(data: PreferenceDataset) -> list[list[list[int]]]:
    pairs = map(data.example, range(len(data)))
    return [[ids.tolist() for ids in (pair.prompt_ids, *pair.responses)] for pair in pairs]


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of all records that are encoded."""
    seen: list[str] = []
    encode_one = encode_module.encode_pair

    def spy(record: Any, *rest: Any) -> Any:
        seen.append(str(record.prompt))
        return encode_one(record, *rest)

    monkeypatch.setattr(encode_module, "encode_pair", spy)
    return seen


@pytest.mark.parametrize("size", [0, 500], ids="{} bytes".format)
def test_damaged_data_are_not_opened_and_are_encoded_again(size: int, tmp_path: Path) -> None:
    path = jsonl(tmp_path, *GOOD)
    [source] = prepare_all(tmp_path, path)
    whole = source.file.read_bytes()
    os.truncate(source.file, size)
    with pytest.raises(DataError, match="damaged"):
        open_dataset([source], DataConfig())
    assert prepare(tmp_path, path) == source.file
    assert source.file.read_bytes() == whole
    assert encoded_folders(tmp_path) == sorted([source.file.name, source.order_file.name])


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    [source] = prepare_all(tmp_path, jsonl(tmp_path, *GOOD))
    whole = source.file.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 200):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        source.file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"data\.cache"):
            open_dataset([source], DataConfig())
    source.file.write_bytes(whole)
    assert len(open_dataset([source], DataConfig())) == len(GOOD)


def test_a_verified_file_is_not_read_for_its_digest_again(tmp_path: Path) -> None:
    [source] = prepare_all(tmp_path, jsonl(tmp_path, *GOOD))
    open_dataset([source], DataConfig())
    with mock.patch("dpo_dist.foundation.tables.content_digest", side_effect=AssertionError):
        assert source.table() is not None


SHAPES = {
    "long prompts": lambda draw: (
        int(draw.lognormvariate(4, 1)) + 1,
        draw.randint(3, 20),
        draw.randint(3, 20),
    ),
    "long responses": lambda draw: (
        9,
        int(draw.lognormvariate(4, 1)) + 1,
        int(draw.lognormvariate(4, 1)) + 1,
    ),
    "a long tail": lambda draw: (800 if draw.random() < 0.1 else 10, 9, 800 if draw.random() < 0.03 else 20),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_that_an_error_names_keep_the_records_that_it_says(shape: str, tmp_path: Path) -> None:
    draw, paths = random.Random(0), []
    for name in "ab":
        sizes = [SHAPES[shape](draw) for _ in range(40)]
        rows = [["".join(draw.choices("0123456789", k=size)) for size in own] for own in sizes]
        (tmp_path / name).mkdir()
        paths.append(
            jsonl(tmp_path / name, *(dict(zip(FIELDS, row, strict=True)) for row in rows), {"other": 1})
        )
    followed = 0
    for truncation, prompt in itertools.product(Truncation, (None, 20)):
        limits = {"max_length": 48, "truncation": truncation, "max_prompt_length": prompt}
        try:
            opened(tmp_path, *paths, **limits)
            continue
        except DataError as error:
            named = re.findall(r"data\.(\w+)=(\w+)(?= or |; |$)", error.remedy)
        assert named
        for key, value in named:
            changed = limits | {key: int(value) if value.isdigit() else Truncation(value)}
            counts = opened(tmp_path, *paths, **changed).counts
            assert counts["kept"]
            followed += 1
    assert followed


def test_a_fault_of_the_disk_names_the_cache(tmp_path: Path) -> None:
    full = mock.patch("dpo_dist.foundation.tables.staged_file", side_effect=OSError("no space left"))
    with full, pytest.raises(ConfigError, match="cannot be written") as raised:
        prepare(tmp_path, jsonl(tmp_path, *GOOD))
    assert raised.value.where == "data.cache"


def test_a_source_is_encoded_once_for_all_lists(tmp_path: Path, encodes: list[str]) -> None:
    (tmp_path / "0").mkdir()
    first, second = jsonl(tmp_path / "0", *GOOD[:3]), jsonl(tmp_path, *GOOD[3:])
    one, two = contents(opened(tmp_path, first)), contents(opened(tmp_path, second))
    encodes.clear()
    shutil.copytree(tmp_path / "0", tmp_path / "elsewhere")
    moved = str(tmp_path / "elsewhere/records.jsonl")
    both = opened(tmp_path, first, second)
    assert contents(both) == one + two
    assert opened(tmp_path, moved, second).fingerprint == both.fingerprint
    assert opened(tmp_path, second, first).fingerprint != both.fingerprint
    assert contents(opened(tmp_path, second, moved, first)) == two + one + one
    assert contents(opened(tmp_path, SourceConfig(first, weight=2.0))) == one
    assert encodes == []
    assert opened(tmp_path, second, moved).origin(5) == Origin(moved, 2)


def test_a_limit_reads_its_records_only(tmp_path: Path, encodes: list[str]) -> None:
    path = jsonl(tmp_path, *GOOD)
    five = opened(tmp_path, SourceConfig(path, limit=5))
    assert len(encodes) == len(five) == 5
    assert len(opened(tmp_path, SourceConfig(path, limit=50))) == 7
    assert contents(opened(tmp_path, path))[:5] == contents(five)
    assert contents(opened(tmp_path, SourceConfig(path, limit=5))) == contents(five)
    assert len(encodes) == 5 + 7 + 7


@pytest.mark.parametrize("put_back", [False, True], ids=["replaced", "replaced and put back"])
def test_files_replaced_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_back: bool) -> None:
    path = Path(jsonl(tmp_path, *GOOD))
    read = DataSource.raw_records

    def overtaken(source: DataSource, *_: Any) -> Iterator[Any]:
        path.rename(tmp_path / "aside")
        jsonl(tmp_path, *GOOD[:3])
        records = list(read(source))
        if put_back:
            (tmp_path / "aside").rename(path)
        return iter(records)

    monkeypatch.setattr(DataSource, "raw_records", overtaken)
    with pytest.raises(DataError, match="changed while they were read"):
        prepare(tmp_path, str(path))
    assert encoded_folders(tmp_path) == []


def test_a_start_reads_no_unchanged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path, *GOOD)
    prepare(tmp_path, path)
    monkeypatch.setattr(digests_module, "content_digest", lambda files: pytest.fail(f"{files} read again"))
    assert len(opened(tmp_path, path)) == 7


def test_each_response_that_was_cut_is_marked_and_counted_by_side(tmp_path: Path) -> None:
    short, long = "a", "b" * 400
    pairs = [(short, "c"), (long, short), (short, long)]
    rows = [{"prompt": "q", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    rows += [{"prompt": "q", "responses": [short, "c", long], "scores": [3, 2, 1]}]
    rows += [{"prompt": "q", "completion": long}]
    paths = []
    for name, own in (("pairs", rows[:3]), ("ranking", rows[3:4]), ("completion", rows[4:])):
        (tmp_path / name).mkdir()
        paths.append(jsonl(tmp_path / name, *own))
    data = opened(tmp_path, *paths, max_length=64, ranked=Ranked.all_pairs)
    marks = [data.truncated[data.response_indices(np.array([index]))].tolist() for index in range(len(data))]
    assert marks == [[False] * 2, [True, False], [False, True], [False] * 2, *([[False, True]] * 2), [True]]
    sides = {"prompt": 0, "response": 4, "chosen": 1, "rejected": 2}
    assert {side: data.counts[f"{side}_truncated"] for side in sides} == sides
    dropped = opened(tmp_path, paths[0], max_length=64, truncation=Truncation.drop, max_bad_share=1.0)
    assert dropped.counts["dropped"] == {"too_long": 2}
    assert not dropped.truncated.any()
