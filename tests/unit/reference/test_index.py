"""Index and memo make a start fast; no damage of them, or that they hide, gives another value."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_dist.data.example import Example
from dpo_dist.encoded.dataset_columns import key_order
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.files import file_identity, remember
from dpo_dist.reference import fill, store
from dpo_dist.reference.fill import FillReport, missing_responses
from dpo_dist.reference.index import file_state, open_index, remember_whole
from dpo_dist.reference.store import ReferenceFingerprint, open_shard
from tests.support.packing import dataset_of, random_pairs
from tests.support.read_only import read_only
from tests.unit.reference.test_fill import filler_of, no_progress
from tests.unit.reference.test_store import (
    ENTRIES,
    FINGERPRINT,
    flip,
    flip_value,
    keys_of,
    open_store,
    readable,
    values,
    write,
)

pytestmark = pytest.mark.slow

MORE = {2: [-9.0], 10: [-0.75, -4.0]}
ALL = ENTRIES | MORE
OTHER = ReferenceFingerprint("other weights", {"dtype": "fp32"})


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard with `ENTRIES`, in a store with another one, an index and a memo."""
    file = write(tmp_path, ENTRIES)
    write(tmp_path, MORE)
    assert readable(tmp_path, list(ALL)) == ALL
    return file


def index_of(folder: Path) -> Path:
    """The newest index."""
    return max(folder.glob("*.index"), key=lambda file: file.stat().st_mtime_ns)


def memo_of(folder: Path) -> dict[str, str]:
    memo: dict[str, str] = json.loads((folder / "verified.json").read_text())
    return memo


def silently(damage: Callable[[], None], file: Path) -> None:
    """Damage a file as a disk does: its size and times stay, or here: the memo has the new ones."""
    digest = file.read_bytes()[-16:].hex()
    damage()
    if file.suffix == ".index":
        remember(file.parent / "file_digests", file_identity(file), digest)
    else:
        remember_whole(file.parent, {file.name: file_state(file)})


def watch_reads(patch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which the name of each shard is added that is opened."""
    names = list[str]()

    def watched(file: Path) -> Any:
        names.append(file.name)
        return open_shard(file)

    patch.setattr(store, "open_shard", watched)
    return names


def test_only_changed_shards_are_read_at_the_next_start(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = watch_reads(monkeypatch)
    assert (readable(tmp_path, list(ALL)), names) == (ALL, [])
    shard.touch()
    opened = open_store(tmp_path)
    for _ in range(2):
        assert opened.contains(keys_of([*ALL])).all()
    assert names == [shard.name] * 2, "its keys when the store is opened, its values once"
    names.clear()
    assert (readable(tmp_path, list(ALL)), names) == (ALL, [])
    # Damage that is known stays named at each start, and the index is not built again.
    flip_value(shard, 4)
    left = {name: entry for name, entry in ALL.items() if name != 4}
    for _ in range(2):
        names.clear()
        assert readable(tmp_path, list(ALL)) == left
        assert {*names} == {shard.name}


def test_what_a_fill_wrote_is_not_read_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, filler = dataset_of(random_pairs([(3, 4, 5)] * 6)), filler_of(tmp_path)
    assert filler.fill(dataset, np.arange(6), no_progress).computed == 12
    assert len(filler.open_filled()) == 12  # which reads the keys for the index, not the values
    names = watch_reads(monkeypatch)
    assert filler_of(tmp_path).fill(dataset, np.arange(6), no_progress) == FillReport(hits=12)
    assert names == []


def test_a_value_damaged_after_it_was_verified_ends_a_run_once(tmp_path: Path, shard: Path) -> None:
    silently(lambda: flip_value(shard, 4), shard)
    opened = open_store(tmp_path)
    assert opened.contains(keys_of([4])).all()
    assert opened.read(keys_of([7, 2]))[0].tolist() == ENTRIES[7]
    with pytest.raises(ReferenceModelError, match="missing or damaged") as raised:
        opened.read(keys_of([7, 4]))
    assert shard.name in raised.value.got
    assert "start the same command again" in raised.value.remedy
    assert readable(tmp_path, list(ALL)).keys() == ALL.keys() - {4}
    write(tmp_path, {4: ENTRIES[4]})
    assert readable(tmp_path, list(ALL)) == ALL


def test_a_damaged_value_of_a_read_only_store_has_its_own_remedy(tmp_path: Path, shard: Path) -> None:
    silently(lambda: flip_value(shard, 4), shard)
    with read_only(tmp_path):
        for _ in range(2):
            with pytest.raises(ReferenceModelError) as raised:
                open_store(tmp_path).read(keys_of([4]))
            assert "another reference.store" in raised.value.remedy


def test_no_silent_damage_of_the_index_gives_another_value(tmp_path: Path, shard: Path) -> None:
    file = index_of(shard.parent)
    whole = file.read_bytes()
    for offset in range(whole.index(np.sort(keys_of([*ALL])[:, 0]).tobytes()), len(whole), 11):
        silently(lambda offset=offset: flip(file, offset, 0x81), file)  # type: ignore[misc]
        try:
            found = readable(tmp_path, list(ALL))
        except (ReferenceModelError, LookupError, ValueError, TypeError, NotImplementedError):
            found = {}
        assert found.items() <= ALL.items(), offset
        file.write_bytes(whole)


def test_an_index_is_verified_again_after_an_error(tmp_path: Path, shard: Path) -> None:
    file = index_of(shard.parent)
    opened = open_store(tmp_path)
    start = opened._index.starts[opened._index.second_words == 4]
    silently(lambda: flip(file, file.read_bytes().index(start.tobytes())), file)
    with pytest.raises(ReferenceModelError):
        readable(tmp_path, list(ALL))
    assert readable(tmp_path, list(ALL)) == ALL


def other_index(folder: Path) -> bytes:
    """Return the index of another set of the same shards."""
    root = folder.parent / "other"
    for name in list(folder.glob("*.safetensors"))[:1]:
        (root / folder.name).mkdir(parents=True)
        shutil.copy2(name, root / folder.name)
    open_store(root)
    return index_of(root / folder.name).read_bytes()


def put(file: Path, content: bytes) -> None:
    file.write_bytes(content)


INDEX_ATTACKS: dict[str, Callable[[Path], None]] = {
    "a flipped key": lambda index: flip(index, 3),
    "a flipped start": lambda index: flip(index, 16 * len(ALL)),
    "a flipped digest": lambda index: flip(index, -1),
    "cut": lambda index: put(index, index.read_bytes()[:-36]),
    "empty": lambda index: put(index, b""),
    "short": lambda index: put(index, b"12345"),
    "longer": lambda index: put(index, index.read_bytes() + bytes(36)),
    "of other shards": lambda index: put(index, other_index(index.parent)),
    "removed": lambda index: index.unlink(),
}
MEMO_ATTACKS: dict[str, Callable[[dict[str, str]], Any]] = {
    "no JSON": lambda _memo: b"{",
    "no text": lambda _memo: b"\xff\xfe",
    "empty": lambda _memo: b"",
    "a list": lambda memo: [*memo],
    "null": lambda _memo: None,
    "numbers": lambda memo: dict.fromkeys(memo, 1),
    "nothing": lambda memo: dict.fromkeys(memo, ""),
    "states of other files": lambda memo: dict(zip(memo, reversed(memo.values()), strict=True)),
}


@pytest.mark.parametrize("attack", INDEX_ATTACKS.values(), ids=INDEX_ATTACKS)
def test_a_damaged_index_is_built_again(tmp_path: Path, shard: Path, attack: Callable[[Path], None]) -> None:
    attack(index_of(shard.parent))
    for _ in range(2):
        assert readable(tmp_path, list(ALL)) == ALL
        assert not open_store(tmp_path).damaged


@pytest.mark.parametrize("attack", MEMO_ATTACKS.values(), ids=MEMO_ATTACKS)
def test_with_a_damaged_memo_everything_is_verified(
    tmp_path: Path, shard: Path, attack: Callable[[dict[str, str]], Any]
) -> None:
    flip_value(shard, 4)
    content = attack(memo_of(shard.parent))
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (shard.parent / "verified.json").write_bytes(content)
    for _ in range(2):
        assert readable(tmp_path, list(ALL)).keys() == ALL.keys() - {4}
    shard.unlink()
    (shard.parent / "verified.json").write_bytes(content)
    assert readable(tmp_path, list(ALL)) == MORE


@pytest.mark.parametrize("with_links", [False, True])
def test_a_copied_folder_is_a_store_under_its_own_name_only(
    tmp_path: Path, shard: Path, with_links: bool
) -> None:
    copied, renamed = tmp_path / "copy" / FINGERPRINT.name, tmp_path / OTHER.name
    for folder in (copied, renamed):
        folder.mkdir(parents=True)
        for file in shard.parent.iterdir():
            if file.is_file():
                (folder / file.name).hardlink_to(file) if with_links else shutil.copy2(file, folder)
    assert readable(copied.parent, list(ALL)) == ALL
    for _ in range(2):
        assert readable(tmp_path, list(ALL), OTHER) == {}
    assert len(store.LogpStore.open(tmp_path, OTHER).damaged) == 2


def test_a_renamed_folder_is_no_store_of_another_model(tmp_path: Path, shard: Path) -> None:
    shard.parent.rename(tmp_path / OTHER.name)
    with pytest.raises(ReferenceModelError, match="start again"):
        readable(tmp_path, list(ALL), OTHER)
    assert readable(tmp_path, list(ALL), OTHER) == {}


def test_keys_damaged_after_the_shard_was_verified_are_lost_when_the_index_is_built(
    tmp_path: Path, shard: Path
) -> None:
    silently(lambda: flip(shard, shard.read_bytes().index(keys_of([7]).tobytes())), shard)
    assert readable(tmp_path, list(ALL)) == ALL, "the index has the keys"
    for index in shard.parent.glob("*.index"):
        index.unlink()
    with pytest.raises(ReferenceModelError, match="start again"):
        open_store(tmp_path)
    for _ in range(2):
        assert readable(tmp_path, list(ALL)) == MORE
        assert open_store(tmp_path).damaged == {f"{FINGERPRINT.name}/{shard.name}"}


def test_an_index_is_removed_when_no_run_has_used_it_for_a_month(tmp_path: Path, shard: Path) -> None:
    before, last = open_store(tmp_path), index_of(shard.parent)
    for index in shard.parent.glob("*.index"):
        os.utime(index, (time.time() - 40 * 86_400,) * 2)
    write(tmp_path, {5: [-5.0]})
    assert readable(tmp_path, [5, *ALL]) == {5: [-5.0], **ALL}
    assert {*shard.parent.glob("*.index")} == {last, index_of(shard.parent)}
    assert [entry.tolist() for entry in before.read(keys_of([*ALL]))] == [*ALL.values()]


def test_a_read_only_store_has_its_index_in_memory(tmp_path: Path) -> None:
    shard = write(tmp_path, ENTRIES)
    before = sorted(shard.parent.iterdir())
    with read_only(tmp_path):
        assert readable(tmp_path) == ENTRIES
        assert sorted(shard.parent.iterdir()) == before


def test_of_two_entries_with_one_key_the_earlier_shard_has_the_first(tmp_path: Path) -> None:
    """Else another shard could change the values that a run reads when it resumes."""
    words = np.arange(1000, dtype=np.uint64) // 3

    def read() -> Iterator[list[np.ndarray[Any, Any]]]:
        for shard in (0, 1):
            yield [words, words, *[np.zeros(1000)] * 3, np.full(1000, shard)]

    index = open_index(tmp_path, ["first", "second"], read)
    keys = np.stack([words, words], axis=1)
    assert not index.shards[index.locate(keys)[0]].any()


KEY = st.integers(0, 8)


@settings(deadline=None, max_examples=50)
@given(
    shards=st.lists(st.sets(KEY, min_size=1), max_size=4),
    examples=st.lists(st.lists(KEY, min_size=1, max_size=3), min_size=1, max_size=12),
    visited=st.sets(st.integers(0, 11)),
    damaged=KEY,
    at_once=st.integers(1, 9),
)
def test_exactly_the_visited_responses_without_an_intact_entry_are_missing(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[set[int]],
    examples: list[list[int]],
    visited: set[int],
    damaged: int,
    at_once: int,
) -> None:
    """One entry is damaged in every second shard."""
    root, stored = tmp_path_factory.mktemp("store"), set[int]()
    for number, names in enumerate(shards):
        entries = {name: [float(name), -float(number)] for name in names}
        file = write(root, entries)
        if is_damaged := number % 2 == 0 and damaged in names:
            flip(file, file.read_bytes().index(values(*entries[damaged]).tobytes()))
        stored |= names - {damaged} if is_damaged else names
    firsts: dict[int, int] = {}
    keys = [(name, index in visited) for index, example in enumerate(examples) for name in example]
    for response, (name, is_visited) in enumerate(keys):
        if is_visited:
            firsts.setdefault(name, response)
    ids = np.ones(1, dtype=np.int32)
    dataset = dataset_of([Example(ids, (ids,) * len(example)) for example in examples])
    named = keys_of([name for name, _ in keys])
    dataset = replace(dataset, keys=named, key_order=key_order(named))
    indices = np.array(sorted(index for index in visited if index < len(examples)), dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill, "RESPONSES_AT_ONCE", at_once)
        missing, hits = missing_responses(open_store(root), dataset, indices)
    assert missing.tolist() == sorted(firsts[name] for name in firsts.keys() - stored)
    assert hits == len(firsts.keys() & stored)
