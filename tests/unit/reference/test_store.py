"""The store returns the entry written under a key or reports it missing; never another value."""

import json
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from dpo_dist.batching.content_keys import Keys
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint, StoredLogps
from tests.support.full_disk import full_disk

FINGERPRINT = ReferenceFingerprint("weights", {"dtype": "fp32"})
Entries: TypeAlias = dict[int, list[float]]
ENTRIES: Entries = {7: [-1.5, -0.25, -3.0], 1: [-2.0], 4: [-0.5, -0.125]}


def keys_of(names: Sequence[int]) -> Keys:
    """Keys of which many share their first word, so that the second word matters too."""
    return np.array([(name % 3, name) for name in names], dtype=np.uint64).reshape(-1, 2)


def values(*numbers: float) -> StoredLogps:
    return np.array(numbers, dtype=np.float32)


def write(root: Path, entries: Entries, fingerprint: ReferenceFingerprint = FINGERPRINT) -> Path:
    """Write these entries as one shard; return its file."""
    store = LogpStore.open(root, fingerprint)
    return root / store.write(keys_of(list(entries)), [values(*entry) for entry in entries.values()])


def open_store(root: Path) -> LogpStore:
    return LogpStore.open(root, FINGERPRINT)


def readable(
    root: Path, names: Sequence[int] = tuple(ENTRIES), fingerprint: ReferenceFingerprint = FINGERPRINT
) -> Entries:
    """The entries of these names that a run would read."""
    store = LogpStore.open(root, fingerprint)
    found = [name for name, stored in zip(names, store.contains(keys_of(names)), strict=True) if stored]
    return {name: entry.tolist() for name, entry in zip(found, store.read(keys_of(found)), strict=True)}


def flip(file: Path, offset: int, by: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= by
    file.write_bytes(bytes(content))


def flip_value(file: Path, name: int) -> None:
    flip(file, file.read_bytes().index(values(*ENTRIES[name]).tobytes()))


def test_all_written_entries_are_read_and_no_others(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    written: dict[int, list[list[float]]] = {}
    for size in (1, 5, 4, 2):
        names = random.choice(13, size, replace=False).tolist()
        entries = {name: random.normal(size=1 + name % 4).astype(np.float32).tolist() for name in names}
        write(tmp_path, entries)
        for name, entry in entries.items():
            written.setdefault(name, []).append(entry)
    found = readable(tmp_path, range(13))
    assert found.keys() == written.keys()
    assert any(len(entries) > 1 for entries in written.values())
    assert all(entry in written[name] for name, entry in found.items())


def test_a_missing_entry_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, ENTRIES)
    with pytest.raises(ReferenceModelError, match="missing or damaged") as raised:
        open_store(tmp_path).read(keys_of([1, 5]))
    assert f"{5 % 3:016x}{5:016x}" in raised.value.got


def test_damaged_entries_are_lost_alone_until_they_are_written_again(tmp_path: Path) -> None:
    file = write(tmp_path, ENTRIES)
    write(tmp_path, {2: [-9.0]})
    flip_value(file, 4)
    assert readable(tmp_path) == {7: ENTRIES[7], 1: ENTRIES[1]}
    store = open_store(tmp_path)
    with pytest.raises(ReferenceModelError):
        store.read(keys_of([4]))
    assert store.damaged == {f"{FINGERPRINT.name}/{file.name}"}
    # The entry computed again is found in the new shard, behind the damaged one.
    write(tmp_path, {4: ENTRIES[4]})
    assert readable(tmp_path) == ENTRIES
    # Of a damaged key nobody knows which: the shard is lost.
    flip(file, file.read_bytes().index(keys_of([7]).tobytes()))
    assert open_store(tmp_path).damaged == {f"{FINGERPRINT.name}/{file.name}"}
    assert readable(tmp_path, [7, 1, 4, 2]) == {4: ENTRIES[4], 2: [-9.0]}
    assert write(tmp_path, dict(reversed(ENTRIES.items()))) == file, "the same entries are the same shard"
    assert readable(tmp_path) == ENTRIES


def test_no_damage_gives_another_value(tmp_path: Path) -> None:
    file = write(tmp_path, ENTRIES)
    whole = file.read_bytes()
    for offset in range(len(whole)):
        flip(file, offset, 0x13)  # changes F to U: the dtype of the values
        assert readable(tmp_path).items() <= ENTRIES.items(), offset
        file.write_bytes(whole)
    for size in range(0, len(whole), 11):
        file.write_bytes(whole[:size])
        assert readable(tmp_path) == {}, size


@pytest.mark.parametrize("content", [None, b"{", b'{"reference": "other", "profile": {}, "label": ""}'])
def test_a_missing_or_damaged_space_json_is_written_again(tmp_path: Path, content: bytes | None) -> None:
    described = write(tmp_path, ENTRIES).parent / "space.json"
    described.unlink() if content is None else described.write_bytes(content)
    assert readable(tmp_path) == ENTRIES
    assert json.loads(described.read_text()) == FINGERPRINT.as_dict()


def test_a_store_or_shard_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReferenceModelError, match="cannot be opened"):
        open_store(tmp_path / "file")
    file = write(tmp_path, ENTRIES)
    name = f"{FINGERPRINT.name}/{file.name}"
    for damage, error in (
        (lambda: flip(file, 8), "cannot be read"),
        (file.unlink, "cannot be read"),
        (file.mkdir, "cannot be opened"),
    ):
        damage()
        with pytest.raises(ReferenceModelError, match=error) as raised:
            LogpStore.open(tmp_path, FINGERPRINT, [name])
        assert name in raised.value.got


def test_a_full_disk_is_an_error_and_leaves_no_partial_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with full_disk(4096), pytest.raises(ReferenceModelError, match="cannot be written"):
        store.write(keys_of([1]), [np.zeros(4096, dtype=np.float32)])
    assert [file.name for file in store.folder.iterdir()] == ["space.json"]


def test_a_shard_is_read_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    seen = list[Entries]()
    replace_file = Path.replace

    def watched(temporary: Path, file: Path) -> Path:
        if file.suffix == ".safetensors":
            assert temporary.stat().st_size > 4 * sum(map(len, ENTRIES.values()))
            seen.append(readable(tmp_path))  # as a run that starts now, or after a kill
        return replace_file(temporary, file)

    monkeypatch.setattr(Path, "replace", watched)
    store.write(keys_of([*ENTRIES]), [values(*entry) for entry in ENTRIES.values()])
    assert (seen, readable(tmp_path)) == ([{}], ENTRIES)


def test_a_store_can_have_more_shards_than_the_limit_of_open_files(tmp_path: Path) -> None:
    wanted = {name: [-float(name)] for name in range(30)}
    for name, entry in wanted.items():
        write(tmp_path, {name: entry})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        assert readable(tmp_path, range(30)) == wanted
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("width", "where"), [(1, "reference.path"), (3, "teacher.path")])
def test_values_that_are_not_finite_are_an_error_of_their_model(
    width: int, where: str, tmp_path: Path
) -> None:
    with pytest.raises(ReferenceModelError, match="not finite") as refused:
        write(tmp_path, {1: [0.5, float("nan"), 2.0]}, replace(FINGERPRINT, width=width))
    assert refused.value.where is not None
    assert refused.value.where.startswith(where)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_what_was_fetched_is_marked_until_it_is_compared(tmp_path: Path) -> None:
    other = replace(FINGERPRINT, profile={"dtype": "fp32", "gpu": "other"})
    write(tmp_path, {7: ENTRIES[7]})
    for name, url, fingerprint in ((1, "a", FINGERPRINT), (4, "b", FINGERPRINT), (5, "a", other)):
        entry = values(*ENTRIES.get(name, [-1.0]))
        LogpStore.open(tmp_path, fingerprint).write(keys_of([name]), [entry], url)
    shards = [f"{file.parent.name}/{file.name}" for file in tmp_path.glob("*/*.safetensors")]
    store = LogpStore.open(tmp_path, FINGERPRINT, shards)

    def places(store: LogpStore) -> dict[str, list[int]]:
        return {url: rows.tolist() for url, rows in store.fetched(keys_of([1, 7, 9, 4, 5])).items()}

    assert places(store) == {"a": [0, 4], "b": [3]}
    assert places(open_store(tmp_path)) == {"a": [0], "b": [3]}
    assert open_store(tmp_path).fetched(keys_of([7, 9])) == {}
    store.settle(["b"], are_right=True)
    assert places(store) == {"a": [0, 4]}
    store.settle(["a"], are_right=False)
    assert readable(tmp_path, [7, 1, 4]) == {7: ENTRIES[7], 4: ENTRIES[4]}
    assert readable(tmp_path, [5], other) == {}
    assert not list(tmp_path.glob("*/*.fetched"))


def test_a_kill_leaves_no_fetched_shard_without_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file = Path.replace

    def killed(temporary: Path, file: Path) -> Path:
        if file.suffix == ".safetensors":
            raise KeyboardInterrupt
        return replace_file(temporary, file)

    store = open_store(tmp_path)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write(keys_of([1]), [values(-1.0)], "a")
    assert list(tmp_path.glob("*/*.fetched"))
    assert open_store(tmp_path).fetched(keys_of([1])) == {}


def test_entries_of_the_same_numerics_come_first(tmp_path: Path) -> None:
    others = [replace(FINGERPRINT, profile={"dtype": "fp32", "gpu": str(gpu)}) for gpu in range(6)]
    for fingerprint in (*others, FINGERPRINT):
        write(tmp_path, {1: [-1.0 if fingerprint == FINGERPRINT else -2.0]}, fingerprint)
    shards = [f"{file.parent.name}/{file.name}" for file in tmp_path.glob("*/*.safetensors")]
    store = LogpStore.open(tmp_path, FINGERPRINT, shards)
    assert [entry.tolist() for entry in store.read(keys_of([1]))] == [[-1.0]]
