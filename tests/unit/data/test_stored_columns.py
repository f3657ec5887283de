"""Columns of a dataset in its file: equal to their definition, computed once, never read if damaged."""

import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.data.config import DataConfig, Ranked, SourceConfig
from dpo_dist.encoded.dataset import (
    PreferenceDataset,
    count_shared,
    count_shared_prompts,
    open_dataset,
)
from dpo_dist.encoded.partners import with_partners
from dpo_dist.encoded.store import EncodedSource, ensure_order
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.tables import Columns, write_table
from tests.support.cache import opened, prepare_all
from tests.support.full_disk import full_disk
from tests.support.read_only import read_only
from tests.support.records import BAD, GOOD, assistant, jsonl, user

pytestmark = pytest.mark.slow

TEXTS = st.text("ab", max_size=4)
PAIRS = st.builds(
    lambda prompt, text, extra: {
        "prompt": f"q{prompt}",
        "chosen": f"{text}c",
        "rejected": f"{text}d",
        **extra,
    },
    TEXTS,
    TEXTS,
    st.sampled_from([{}, {}, {"loss_weight": 2.0}, {"margin": 0.5}]),
)
RANKINGS = st.builds(
    lambda prompt, texts: {
        "prompt": f"q{prompt}",
        "responses": texts,
        "scores": [*range(len(texts), 0, -1)],
    },
    TEXTS,
    st.lists(TEXTS.map("a".__add__), min_size=2, max_size=4, unique=True),
)
LABELLED = st.builds(
    lambda prompt, text, label: {"prompt": f"q{prompt}", "completion": f"{text}c", "label": label},
    TEXTS,
    TEXTS,
    st.booleans(),
)
TURNS = st.builds(  # the loss counts the turns of the assistant only: there are masks
    lambda prompt, text: {
        "prompt": [user(f"q{prompt}")],
        "chosen": [assistant(text + "c"), user("and?"), assistant("d")],
        "rejected": [assistant(text + "e")],
    },
    TEXTS,
    TEXTS,
)


def mixed(kind: Any) -> Any:
    """Records of a kind; bad ones among pairs, whose columns they have."""
    return kind | st.just(BAD) if kind is PAIRS else kind


def in_batches(sources: Sequence[EncodedSource], records: int, cache: Path) -> list[EncodedSource]:
    """Return the same sources in other files, which have batches of so many records."""
    copies = [replace(source, cache=cache) for source in sources]
    cache.mkdir()
    for source, copy in zip(sources, copies, strict=True):
        table = source.table()
        assert table is not None
        with write_table(copy.file, table.schema.remove_metadata()) as writer:
            for batch in table.to_batches(records):
                writer.write_batch(batch)
        ensure_order(copy, None)
    return copies


def columns(data: PreferenceDataset) -> dict[str, Any]:
    """Return what a dataset holds, by name; but not where its files are."""
    places = ("encoded", "columns_files")
    found = {each.name: getattr(data, each.name) for each in fields(data) if each.name not in places}
    found |= {f"number {name}": values for name, values in found.pop("numbers").items()}
    return found | ({} if data.prefixes is None else vars(found.pop("prefixes")))


def assert_same(one: PreferenceDataset, other: PreferenceDataset) -> None:
    first, second = columns(one), columns(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, (str, dict, tuple, int)) or value is None:
            assert value == second[name], name
        else:
            assert np.asarray(value).dtype == np.asarray(second[name]).dtype, name
            np.testing.assert_array_equal(np.asarray(value), np.asarray(second[name]), name)


def keys_of_examples(data: PreferenceDataset) -> list[bytes]:
    return [response_keys([data.example(index)]).tobytes() for index in range(len(data))]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([PAIRS, RANKINGS, LABELLED, TURNS]).flatmap(
        lambda kind: st.lists(
            st.lists(kind | st.just(BAD) if kind is PAIRS else kind, min_size=1, max_size=7),
            min_size=1,
            max_size=3,
        )
    ),
    st.sampled_from(Ranked),
    st.sampled_from([None, 3]),
    st.integers(1, 3),
)
def test_columns_are_those_of_the_records_in_batches_of_any_size(
    rows: Any, how: Ranked, limit: int | None, records: int
) -> None:
    data = DataConfig(max_bad_share=1.0)
    with tempfile.TemporaryDirectory() as name, mock.patch("os.fsync"):
        folder, configs = Path(name), []
        for number, own in enumerate(rows):
            (folder / str(number)).mkdir()
            own[0] = own[0] if own[0] != BAD else GOOD[0]
            configs.append(SourceConfig(jsonl(folder / str(number), *own), limit=limit))
        sources = prepare_all(folder, *configs, max_bad_share=1.0, ranked=how)
        whole = open_dataset(sources, data)
        assert_same(whole, open_dataset(in_batches(sources, records, folder / "copy"), data))
        first, last = (open_dataset([source], data) for source in (sources[0], sources[-1]))
    examples = keys_of_examples(whole)
    assert whole.keys.tobytes() == b"".join(examples)
    assert whole.counts["duplicates"] == len(examples) - len({*examples})
    by_key = sorted(range(len(whole.keys)), key=lambda index: whole.keys[index].tolist())
    assert whole.key_order.tolist() == by_key
    every = np.arange(len(whole))
    responses, counts = whole.response_indices(every), whole.response_counts(every)
    assert whole.prefixes is not None
    np.testing.assert_array_equal(whole.prefixes.rows, whole.first_rows(every, responses, counts))
    for one, other in ((whole, first), (first, whole), (last, first)):
        seen = {*keys_of_examples(other)}
        assert count_shared(one, other) == sum(key in seen for key in keys_of_examples(one))
        prompts = {*map(int, other.prompt_hashes)}
        assert count_shared_prompts(one, other) == sum(int(each) in prompts for each in one.prompt_hashes)


def labelled(folder: Path, *labels: bool) -> str:
    rows = [
        {"prompt": f"question {n}", "completion": f"an answer {n}" * n, "label": label}
        for n, label in enumerate(labels, start=1)
    ]
    return jsonl(folder, *rows)


@pytest.mark.parametrize("damage", ["absent", "cut", "bit", "of other records"])
@pytest.mark.parametrize("of_partners", [False, True])
def test_damaged_columns_are_not_read_and_are_computed_again(
    of_partners: bool, damage: str, tmp_path: Path
) -> None:
    def start(path: str) -> tuple[PreferenceDataset, Path]:
        before = {*(tmp_path / "cache").glob("*-columns.arrow")}
        data = opened(tmp_path, path)
        data = with_partners(data, 30) if of_partners else data
        new = sorted(
            {*(tmp_path / "cache").glob("*-columns.arrow")} - before, key=lambda file: "-30-" in file.name
        )
        return data, new[-1] if new else Path()

    path = labelled(tmp_path, True, False, True, False)
    data, file = start(path)
    whole = file.read_bytes()
    file.unlink()  # `data` have mapped it
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "bit":
        at = random.Random(0).randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    elif damage == "of other records":
        (tmp_path / "other").mkdir()
        _, other = start(labelled(tmp_path / "other", False, True, False, True))
        file.write_bytes(other.read_bytes())
    again, _ = start(path)
    assert_same(data, again)
    assert file.read_bytes() == whole


def test_a_second_start_writes_nothing_and_shares_the_pages_of_the_files(tmp_path: Path) -> None:
    path = labelled(tmp_path, True, False, True, False)

    def state() -> list[tuple[str, int, int]]:
        files = sorted((tmp_path / "cache").rglob("*"))
        return [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in files]

    first = with_partners(opened(tmp_path, path), 30)
    before = state()
    again = with_partners(opened(tmp_path, path), 30)
    assert state() == before
    assert_same(first, again)
    shorter = with_partners(opened(tmp_path, path), 12)
    assert shorter.piece_tokens.sum() < first.piece_tokens.sum()
    for name, values in columns(again).items():
        if isinstance(values, np.ndarray):
            assert not values.flags.owndata, name
            assert not values.flags.writeable, name


def test_columns_of_records_that_moved_name_the_new_path(tmp_path: Path) -> None:
    opened(tmp_path, jsonl(tmp_path, *GOOD, BAD), max_bad_share=1.0)
    (tmp_path / "elsewhere").mkdir()
    moved = jsonl(tmp_path / "elsewhere", *GOOD, BAD)
    data = opened(tmp_path, moved, max_bad_share=1.0)
    assert len([*(tmp_path / "cache").glob("*-columns.arrow")]) == 1
    assert str(data.origin(6)) == f"{moved}:7"
    assert data.counts["examples"][0].startswith(f"{moved}:8 ")
    assert data.counts["sources"][0]["path"] == moved


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_column_on_a_full_disk_is_whole_or_an_error(shape: tuple[int, ...], tmp_path: Path) -> None:
    first, failed = np.ones((1000, *shape), dtype=np.int64), list[int]()
    sizes = (0, 1, 12, 13, 24, 25, 100, 500, 513, 5000)  # small ones only fail when the file is closed
    for values in sizes:
        (folder := tmp_path / str(values)).mkdir()
        columns, second = Columns(folder), np.full((values, *shape), 2, dtype=np.int64)
        columns.append(name=first)
        try:
            with full_disk(first.nbytes + 24 * 8):
                columns.append(name=second)
        except OSError:
            failed.append(values)
            continue
        np.testing.assert_array_equal(columns["name"], np.concatenate((first, second)))
        [file] = folder.iterdir()
        os.truncate(file, first.nbytes - 8)
        with pytest.raises(OSError, match="in place of"):
            columns["name"]
    assert failed == [values for values in sizes if np.prod((values, *shape)) > 24]


def test_columns_are_right_or_an_error_if_the_disk_is_full_for_a_moment(tmp_path: Path) -> None:
    path, append = labelled(tmp_path, *[True, False] * 20), Columns.append
    whole = with_partners(opened(tmp_path, path), 30)
    failed, limits = list[str | None](), range(0, 3000, 199)
    for limit in limits:

        def fills(self: Columns, limit: int = limit, **chunks: Any) -> None:
            with full_disk(limit):
                append(self, **chunks)

        for file in (tmp_path / "cache").glob("*-columns.arrow"):
            file.unlink()
        try:
            with mock.patch.object(Columns, "append", fills):
                data = with_partners(opened(tmp_path, path), 30)
        except ConfigError as error:
            failed.append(error.where)
            data = with_partners(opened(tmp_path, path), 30)
        assert_same(data, whole)
    assert 0 < len(failed) < len(limits)
    assert {*failed} == {"data.cache"}


def test_complete_data_on_a_read_only_disk_are_read(tmp_path: Path) -> None:
    path = labelled(tmp_path, True, False, True, False)
    whole = with_partners(opened(tmp_path, path), 30)
    with read_only(tmp_path / "cache"):
        assert_same(with_partners(opened(tmp_path, path), 30), whole)
        with pytest.raises(ConfigError, match="cannot be written") as raised:
            with_partners(opened(tmp_path, path), 12)
    assert raised.value.where == "data.cache"


def test_columns_that_cannot_be_written_are_one_error_that_names_the_cache(tmp_path: Path) -> None:
    sources = prepare_all(tmp_path, jsonl(tmp_path, *GOOD))
    full = mock.patch("dpo_dist.foundation.files.Path.mkdir", side_effect=OSError("read-only file system"))
    with full, pytest.raises(ConfigError, match="cannot be written") as raised:
        open_dataset(sources, DataConfig())
    assert raised.value.where == "data.cache"


def test_records_that_the_configuration_refuses_are_refused_with_columns_too(tmp_path: Path) -> None:
    sources = prepare_all(tmp_path, jsonl(tmp_path, *GOOD, BAD))
    open_dataset(sources, DataConfig(max_bad_share=1.0))
    with pytest.raises(DataError, match="1 of 8 records cannot be used"):
        open_dataset(sources, DataConfig(max_bad_share=0.05))
