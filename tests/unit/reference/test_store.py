"""The store returns the entry written under a key or reports it missing; never another value."""

import json
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.reference.fingerprint import ReferenceFingerprint, read_fingerprint
from dpo_dist.reference.shard import Keys, Values
from dpo_dist.reference.store import LogpStore
from tests.support.read_only import read_only

FINGERPRINT = ReferenceFingerprint("weights", {"dtype": "fp32"})
Entries: TypeAlias = dict[int, list[float]]


def keys_of(names: Sequence[int]) -> Keys:
    """Return keys of which many share their first word, so that the second word matters too."""
    return np.array([(name % 3, name) for name in names], dtype=np.uint64).reshape(-1, 2)


def values(*numbers: float) -> Values:
    return np.array(numbers, dtype=np.float32)


def write(root: Path, entries: Entries, fingerprint: ReferenceFingerprint = FINGERPRINT) -> Path:
    """Write these entries as one shard; return its file."""
    store = LogpStore.open(root, fingerprint, [])
    return root / store.write(keys_of(list(entries)), [values(*entry) for entry in entries.values()])


def open_store(root: Path) -> LogpStore:
    return LogpStore.open(root, FINGERPRINT)


def readable(root: Path, names: Sequence[int], fingerprint: ReferenceFingerprint = FINGERPRINT) -> Entries:
    """Return the entries of these names that a run would read."""
    store = LogpStore.open(root, fingerprint)
    found = [name for name, stored in zip(names, store.contains(keys_of(names)), strict=True) if stored]
    return {name: entry.tolist() for name, entry in zip(found, store.read(keys_of(found)), strict=True)}


ENTRIES: Entries = {7: [-1.5, -0.25, -3.0], 1: [-2.0], 4: [-0.5, -0.125]}


def test_entries_are_read_by_key_in_any_order(tmp_path: Path) -> None:
    write(tmp_path, ENTRIES)
    store = open_store(tmp_path)
    assert len(store) == 3
    assert store.contains(keys_of([4, 2, 1, 7])).tolist() == [True, False, True, True]
    assert [entry.tolist() for entry in store.read(keys_of([4, 7, 1, 7]))] == [
        ENTRIES[4],
        ENTRIES[7],
        ENTRIES[1],
        ENTRIES[7],
    ]
    assert {entry.dtype for entry in store.read(keys_of([4, 7]))} == {np.dtype(np.float32)}


def test_a_missing_entry_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, ENTRIES)
    with pytest.raises(ReferenceModelError, match="missing or damaged") as raised:
        open_store(tmp_path).read(keys_of([1, 5]))
    assert f"{5 % 3:016x}{5:016x}" in raised.value.got
    assert raised.value.remedy


def test_an_empty_store_contains_no_key(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new" / "store")
    assert store.contains(keys_of([1, 2])).tolist() == [False, False]
    assert store.shards == {}
    assert json.loads((store.folder / "space.json").read_text()) == FINGERPRINT.as_dict()
    assert read_fingerprint(store.folder) == FINGERPRINT


def test_another_fingerprint_sees_none_of_the_entries(tmp_path: Path) -> None:
    write(tmp_path, ENTRIES)
    for other in (
        ReferenceFingerprint("new weights", FINGERPRINT.profile),
        ReferenceFingerprint("weights", {"dtype": "bf16"}),
    ):
        assert not LogpStore.open(tmp_path, other).contains(keys_of(list(ENTRIES))).any()


@settings(max_examples=15)
@given(
    st.lists(
        st.dictionaries(
            st.integers(0, 12),
            st.lists(st.floats(-100, 0, width=32), min_size=1, max_size=4),
            min_size=1,
            max_size=5,
        ),
        max_size=6,
    )
)
def test_all_written_entries_are_read(writes: list[Entries]) -> None:
    with TemporaryDirectory() as folder:
        written: dict[int, list[list[float]]] = {}
        for entries in writes:
            write(Path(folder), entries)
            for name, entry in entries.items():
                written.setdefault(name, []).append(entry)
        names, store = list(range(13)), open_store(Path(folder))
        for found in (store.contains(keys_of(names)), store.has_keys(keys_of(names))):
            assert found.tolist() == [name in written for name in names]
        for name, entry in zip(written, store.read(keys_of(list(written))), strict=True):
            assert entry.tolist() in written[name]


def test_the_same_entries_are_the_same_shard(tmp_path: Path) -> None:
    reordered = dict(reversed(ENTRIES.items()))
    assert write(tmp_path, ENTRIES) == write(tmp_path, reordered)
    assert len(open_store(tmp_path)) == 3


def flip(file: Path, offset: int, by: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= by
    file.write_bytes(bytes(content))


def test_a_flipped_value_loses_only_its_entry(tmp_path: Path) -> None:
    write(tmp_path, ENTRIES)
    file = next(tmp_path.glob("*/*.safetensors"))
    flip(file, file.read_bytes().index(values(*ENTRIES[4]).tobytes()))
    assert readable(tmp_path, list(ENTRIES)) == {7: ENTRIES[7], 1: ENTRIES[1]}
    with pytest.raises(ReferenceModelError):
        open_store(tmp_path).read(keys_of([4]))
    # The entry computed again is found in the new shard, behind the damaged one.
    write(tmp_path, {4: ENTRIES[4]})
    assert readable(tmp_path, list(ENTRIES)) == ENTRIES


def test_a_flipped_key_loses_the_shard_until_it_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, ENTRIES)
    write(tmp_path, {2: [-9.0]})
    flip(file, file.read_bytes().index(keys_of([7]).tobytes()))
    store = open_store(tmp_path)
    assert store.damaged == [f"{FINGERPRINT.name}/{file.name}"]
    assert file.name in caplog.text
    assert store.contains(keys_of([7, 1, 4, 2])).tolist() == [False, False, False, True]
    assert write(tmp_path, ENTRIES) == file
    assert open_store(tmp_path).contains(keys_of([7, 1, 4, 2])).all()


def test_no_changed_byte_gives_another_value(tmp_path: Path) -> None:
    file = write(tmp_path, ENTRIES)
    whole = file.read_bytes()
    for offset in range(len(whole)):
        flip(file, offset, 0x13)  # changes F to U: the dtype of the values
        assert readable(tmp_path, list(ENTRIES)).items() <= ENTRIES.items(), offset
        file.write_bytes(whole)


def test_damaged_entries_are_counted_by_shard(tmp_path: Path) -> None:
    files = sorted(write(tmp_path, {name: [-1.0]}) for name in (1, 2, 4))
    for damaged in files[1:]:
        flip(damaged, damaged.stat().st_size - 1)
    store = open_store(tmp_path)
    store.contains(keys_of([1, 2, 4]))
    assert store.damaged_entries == {f"{FINGERPRINT.name}/{file.name}": 1 for file in files[1:]}


def test_no_truncation_gives_another_value(tmp_path: Path) -> None:
    file = write(tmp_path, ENTRIES)
    whole = file.read_bytes()
    for size in range(0, len(whole), 11):
        file.write_bytes(whole[:size])
        assert readable(tmp_path, list(ENTRIES)) == {}, size


@pytest.mark.parametrize("content", [b"", b"no shard at all", b"\x02" + bytes(7) + b"[]", b"\xff" * 64])
def test_a_foreign_file_is_ignored_and_reported(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, ENTRIES).parent
    (folder / "foreign.safetensors").write_bytes(content)
    save_file({"other": np.zeros(3)}, folder / "other.safetensors")
    (folder / "half.safetensors.tmp-123456789abc").write_bytes(b"half")
    (folder / f"{'0' * 32}.safetensors").mkdir()
    shardlike = f"{'1' * 32}.safetensors"
    (folder / shardlike).write_bytes(content)
    store = open_store(tmp_path)
    assert store.damaged == [f"{FINGERPRINT.name}/{shardlike}"]
    foreign = [f"{'0' * 32}.safetensors", "foreign.safetensors", "other.safetensors"]
    assert store.foreign == [f"{FINGERPRINT.name}/{name}" for name in foreign]
    assert all(name in caplog.text for name in foreign)
    assert store.contains(keys_of(list(ENTRIES))).all()


@pytest.mark.parametrize(
    "other", [ReferenceFingerprint("other", FINGERPRINT.profile), ReferenceFingerprint("weights", {})]
)
def test_a_shard_copied_from_another_fingerprint_is_damaged(
    tmp_path: Path, other: ReferenceFingerprint
) -> None:
    """Its keys, checksums and values are intact, but belong to another reference."""
    whole, own = write(tmp_path, ENTRIES, other), write(tmp_path, {2: [-1.0]})
    shutil.copy(whole, own.parent)
    store = open_store(tmp_path)
    assert store.damaged == [f"{FINGERPRINT.name}/{whole.name}"]
    assert store.contains(keys_of([*ENTRIES, 2])).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b'{"reference": "other", "profile": {}, "label": ""}']
)
def test_a_missing_or_damaged_space_json_is_written_again(tmp_path: Path, content: bytes | None) -> None:
    described = write(tmp_path, ENTRIES).parent / "space.json"
    open_store(tmp_path)
    described.unlink()
    if content is not None:
        described.write_bytes(content)
    assert readable(tmp_path, list(ENTRIES)) == ENTRIES
    assert json.loads(described.read_text()) == FINGERPRINT.as_dict()


@pytest.mark.parametrize("described", [True, False])
def test_a_read_only_store_is_read_and_writing_is_an_error(tmp_path: Path, described: bool) -> None:
    folder = write(tmp_path, ENTRIES).parent
    open_store(tmp_path)
    if not described:
        (folder / "space.json").unlink()
    with read_only(tmp_path):
        assert readable(tmp_path, list(ENTRIES)) == ENTRIES
        with pytest.raises(ReferenceModelError, match="cannot be written") as raised:
            open_store(tmp_path).write(keys_of([9]), [values(-1.0)])
        assert "Read-only" in raised.value.got
        with pytest.raises(ReferenceModelError, match="cannot be opened"):
            LogpStore.open(tmp_path, ReferenceFingerprint("new", {}))


def test_compatible_entries_are_used_where_the_own_fingerprint_has_none(tmp_path: Path) -> None:
    near, far = (ReferenceFingerprint("weights", {"dtype": "fp32", "torch": number}) for number in "12")
    write(tmp_path, {1: [-1.0]})
    write(tmp_path, {1: [-1.5], 2: [-2.0]}, near)
    write(tmp_path, {1: [-1.25], 2: [-2.5], 3: [-3.0]}, far)
    store = LogpStore.open(tmp_path, FINGERPRINT, compatible=[near, far])
    keys = keys_of([1, 2, 3, 4])
    assert store.contains(keys).tolist() == [True, True, True, False]
    assert [entry.tolist() for entry in store.read(keys[:3])] == [[-1.0], [-2.0], [-3.0]]
    assert store.sources(keys).tolist() == [0, 1, 2, -1]
    again = LogpStore.open(tmp_path, FINGERPRINT, list(store.shards))
    assert [entry.tolist() for entry in again.read(keys[:3])] == [[-1.0], [-2.0], [-3.0]]
    assert open_store(tmp_path).contains(keys).tolist() == [True, False, False, False]
    # Entries are written under the own fingerprint only.
    store.write(keys[3:], [values(-4.0)])
    assert open_store(tmp_path).contains(keys).tolist() == [True, False, False, True]


def test_own_entries_are_preferred_whatever_the_names_of_the_folders(tmp_path: Path) -> None:
    other, names = ReferenceFingerprint("weights", {"dtype": "fp32", "torch": "1"}), range(60)
    write(tmp_path, {name: [-1.0] for name in names}, FINGERPRINT)
    write(tmp_path, {name: [-2.0] for name in names}, other)
    for own, compatible, value in ((FINGERPRINT, other, -1.0), (other, FINGERPRINT, -2.0)):
        store = LogpStore.open(tmp_path, own, compatible=[compatible])
        for view in (store, store.wait_for(store.shards)):
            assert [entry.tolist() for entry in view.read(keys_of(names))] == [[value]] * len(names)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_not_stored(tmp_path: Path, number: float) -> None:
    with pytest.raises(ReferenceModelError, match="not finite") as raised:
        write(tmp_path, {1: [-1.0], 2: [-1.0, number]})
    assert raised.value.got == "1 of 2 responses"
    assert not open_store(tmp_path).contains(keys_of([1])).any()


def test_a_full_disk_is_an_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ReferenceModelError, match="cannot be written") as raised:
            store.write(keys_of([1]), [np.zeros(4096, dtype=np.float32)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.where == "reference.store"
    assert [file.name for file in store.folder.iterdir()] == ["space.json"]


def test_a_store_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReferenceModelError, match="cannot be opened"):
        open_store(tmp_path / "file")


def test_a_store_can_have_more_shards_than_the_limit_of_open_files(tmp_path: Path) -> None:
    for name in range(60):
        write(tmp_path, {name: [-float(name)]})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        assert readable(tmp_path, range(60)) == {name: [-float(name)] for name in range(60)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_cannot_be_read_is_not_a_damaged_one(tmp_path: Path) -> None:
    """Computing its entries again would be expensive and would not fix the cause."""
    file = write(tmp_path, ENTRIES)
    name = f"{FINGERPRINT.name}/{file.name}"
    file.unlink()
    file.mkdir()
    with pytest.raises(ReferenceModelError, match="cannot be opened") as raised:
        LogpStore.open(tmp_path, FINGERPRINT, [name])
    assert file.name in raised.value.got
