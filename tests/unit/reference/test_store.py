"""The store gives back what was written under a key, or says that it has nothing; never anything else."""

import json
import multiprocessing
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dpo_dist.errors import ReferenceModelError
from dpo_dist.reference.fingerprint import ReferenceFingerprint, read_fingerprint
from dpo_dist.reference.shard import Keys, Values
from dpo_dist.reference.store import LogpStore
from tests.support.read_only import read_only

SPACE = ReferenceFingerprint("weights", {"dtype": "fp32"})
Entries: TypeAlias = dict[int, list[float]]


def keys_of(names: Sequence[int]) -> Keys:
    """Keys of which many share their first word, as no digest does, so that the second one matters too."""
    return np.array([(name % 3, name) for name in names], dtype=np.uint64).reshape(-1, 2)


def values(*numbers: float) -> Values:
    return np.array(numbers, dtype=np.float32)


def write(root: Path, rows: Entries, space: ReferenceFingerprint = SPACE) -> Path:
    """Write these rows as one shard and give its file."""
    store = LogpStore.open(root, space, [])
    return root / store.write(keys_of(list(rows)), [values(*row) for row in rows.values()])


def open_store(root: Path) -> LogpStore:
    return LogpStore.open(root, SPACE)


def readable(root: Path, names: Sequence[int], space: ReferenceFingerprint = SPACE) -> Entries:
    """The rows of these names that a run would read."""
    store = LogpStore.open(root, space)
    held = [name for name, holds in zip(names, store.contains(keys_of(names)), strict=True) if holds]
    return {name: row.tolist() for name, row in zip(held, store.read(keys_of(held)), strict=True)}


ROWS: Entries = {7: [-1.5, -0.25, -3.0], 1: [-2.0], 4: [-0.5, -0.125]}


def test_rows_are_read_by_key_in_any_order(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    store = open_store(tmp_path)
    assert len(store) == 3
    assert store.contains(keys_of([4, 2, 1, 7])).tolist() == [True, False, True, True]
    assert [row.tolist() for row in store.read(keys_of([4, 7, 1, 7]))] == [ROWS[4], ROWS[7], ROWS[1], ROWS[7]]
    assert {row.dtype for row in store.read(keys_of([4, 7]))} == {np.dtype(np.float32)}


def test_a_missing_row_is_an_error_and_never_a_guess(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    with pytest.raises(ReferenceModelError, match="missing or damaged") as raised:
        open_store(tmp_path).read(keys_of([1, 5]))
    assert f"{5 % 3:016x}{5:016x}" in raised.value.got
    assert raised.value.remedy


def test_an_empty_store_holds_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new" / "store")
    assert store.contains(keys_of([1, 2])).tolist() == [False, False]
    assert store.names == []
    assert json.loads((store.folder / "space.json").read_text()) == SPACE.describe()
    assert read_fingerprint(store.folder) == SPACE


def test_another_space_sees_none_of_the_rows(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    for other in (
        ReferenceFingerprint("new weights", SPACE.profile),
        ReferenceFingerprint("weights", {"dtype": "bf16"}),
    ):
        assert not LogpStore.open(tmp_path, other).contains(keys_of(list(ROWS))).any()


def test_a_view_sees_the_shards_it_was_opened_with(tmp_path: Path) -> None:
    first = write(tmp_path, {1: [-1.0]})
    store = open_store(tmp_path)
    write(tmp_path, {2: [-2.0]})
    assert store.contains(keys_of([1, 2])).tolist() == [True, False]
    name = f"{SPACE.name}/{first.name}"
    again = LogpStore.open(tmp_path, SPACE, [name])
    assert again.names == store.names == [name]
    assert open_store(tmp_path).contains(keys_of([1, 2])).all()


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
def test_whatever_was_written_is_read(writes: list[Entries]) -> None:
    with TemporaryDirectory() as folder:
        written: dict[int, list[list[float]]] = {}
        for rows in writes:
            write(Path(folder), rows)
            for name, row in rows.items():
                written.setdefault(name, []).append(row)
        names = list(range(13))
        store = open_store(Path(folder))
        assert store.contains(keys_of(names)).tolist() == [name in written for name in names]
        for name, row in zip(written, store.read(keys_of(list(written))), strict=True):
            assert row.tolist() in written[name]


def test_the_same_rows_are_the_same_shard(tmp_path: Path) -> None:
    reordered = dict(reversed(ROWS.items()))
    assert write(tmp_path, ROWS) == write(tmp_path, reordered)
    assert len(open_store(tmp_path)) == 3


def flip(file: Path, place: int, by: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= by
    file.write_bytes(bytes(content))


def test_a_flipped_value_loses_its_row_only(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    file = next(tmp_path.glob("*/*.safetensors"))
    place = file.read_bytes().index(values(*ROWS[4]).tobytes())
    flip(file, place)
    assert readable(tmp_path, list(ROWS)) == {7: ROWS[7], 1: ROWS[1]}
    with pytest.raises(ReferenceModelError):
        open_store(tmp_path).read(keys_of([4]))
    # What is missing is computed again, and found in the new shard behind the damaged row.
    write(tmp_path, {4: ROWS[4]})
    assert readable(tmp_path, list(ROWS)) == ROWS


def test_a_flipped_key_loses_the_shard_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, ROWS)
    write(tmp_path, {2: [-9.0]})
    flip(file, file.read_bytes().index(keys_of([7]).tobytes()))
    store = open_store(tmp_path)
    assert store.damaged == [f"{SPACE.name}/{file.name}"]
    assert file.name in caplog.text
    assert store.contains(keys_of([7, 1, 4, 2])).tolist() == [False, False, False, True]
    # The same rows computed again put a whole shard in its place.
    assert write(tmp_path, ROWS) == file
    assert open_store(tmp_path).contains(keys_of([7, 1, 4, 2])).all()


def test_no_changed_byte_gives_another_value(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    whole = file.read_bytes()
    for place in range(len(whole)):
        flip(file, place, 0x13)  # makes a U of an F: the dtype of the values
        assert readable(tmp_path, list(ROWS)).items() <= ROWS.items(), place
        file.write_bytes(whole)


def test_a_shard_that_was_cut_short_keeps_the_rows_before_the_cut(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    content = file.read_bytes()
    last = content.index(values(*ROWS[7]).tobytes())
    assert last > content.index(values(*ROWS[4]).tobytes())
    for size in (last + 4, last + 7):
        file.write_bytes(content[:size])
        store = open_store(tmp_path)
        assert store.contains(keys_of([1, 4, 7])).tolist() == [True, True, False]
        assert store.damaged_rows == {f"{SPACE.name}/{file.name}": 1}
    write(tmp_path, {7: ROWS[7]})
    assert readable(tmp_path, list(ROWS)) == ROWS


def test_no_truncation_gives_another_value(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    whole = file.read_bytes()
    for size in range(0, len(whole), 5):
        file.write_bytes(whole[:size])
        assert readable(tmp_path, list(ROWS)).items() <= ROWS.items(), size


@pytest.mark.parametrize("content", [b"", b"no shard at all", b"\x02" + bytes(7) + b"[]", b"\xff" * 64])
def test_a_foreign_file_is_passed_over_and_named(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, ROWS).parent
    (folder / "foreign.safetensors").write_bytes(content)
    save_file({"other": np.zeros(3)}, folder / "other.safetensors")
    (folder / "half.safetensors.tmp-123456789abc").write_bytes(b"half")
    (folder / f"{'0' * 32}.safetensors").mkdir()
    shardlike = f"{'1' * 32}.safetensors"
    (folder / shardlike).write_bytes(content)
    store = open_store(tmp_path)
    assert store.damaged == [f"{SPACE.name}/{shardlike}"]
    foreign = [f"{'0' * 32}.safetensors", "foreign.safetensors", "other.safetensors"]
    assert store.foreign == [f"{SPACE.name}/{name}" for name in foreign]
    assert all(name in caplog.text for name in foreign)
    assert store.contains(keys_of(list(ROWS))).all()


def test_a_shard_that_went_away_is_missing_rows(tmp_path: Path) -> None:
    store = LogpStore.open(tmp_path, SPACE, ["0123.safetensors"])
    assert store.damaged == ["0123.safetensors"]
    assert not store.contains(keys_of([1])).any()


def test_a_shard_under_another_s_name_is_passed_over(tmp_path: Path) -> None:
    first, second = write(tmp_path, {1: [-1.0]}), write(tmp_path, {2: [-2.0]})
    first.write_bytes(second.read_bytes())
    assert open_store(tmp_path).contains(keys_of([1, 2])).tolist() == [False, True]


@pytest.mark.parametrize(
    "other", [ReferenceFingerprint("other", SPACE.profile), ReferenceFingerprint("weights", {})]
)
def test_a_shard_copied_in_from_another_space_is_refused(tmp_path: Path, other: ReferenceFingerprint) -> None:
    """Its keys, checksums and values are all as they were written, but of another reference."""
    whole = write(tmp_path, ROWS, other)
    own = write(tmp_path, {2: [-1.0]})
    shutil.copy(whole, own.parent)
    store = open_store(tmp_path)
    assert store.damaged == [f"{SPACE.name}/{whole.name}"]
    assert store.contains(keys_of([*ROWS, 2])).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b'{"reference": "other", "profile": {}, "label": ""}']
)
def test_a_space_that_does_not_say_what_it_is_serves_and_is_mended(
    tmp_path: Path, content: bytes | None
) -> None:
    described = write(tmp_path, ROWS).parent / "space.json"
    open_store(tmp_path)
    described.unlink()
    if content is not None:
        described.write_bytes(content)
    assert readable(tmp_path, list(ROWS)) == ROWS
    assert json.loads(described.read_text()) == SPACE.describe()


@pytest.mark.parametrize("described", [True, False])
def test_a_read_only_store_serves_what_it_has_and_tells_what_cannot_be_written(
    tmp_path: Path, described: bool
) -> None:
    folder = write(tmp_path, ROWS).parent
    open_store(tmp_path)
    if not described:
        (folder / "space.json").unlink()
    with read_only(tmp_path):
        assert readable(tmp_path, list(ROWS)) == ROWS
        with pytest.raises(ReferenceModelError, match="cannot be written") as raised:
            open_store(tmp_path).write(keys_of([9]), [values(-1.0)])
        assert "Read-only" in raised.value.got
        with pytest.raises(ReferenceModelError, match="cannot be opened"):
            LogpStore.open(tmp_path, ReferenceFingerprint("new", {}))


def test_rows_of_kin_serve_where_the_own_space_has_none(tmp_path: Path) -> None:
    near, far = (ReferenceFingerprint("weights", {"dtype": "fp32", "torch": number}) for number in "12")
    write(tmp_path, {1: [-1.0]})
    write(tmp_path, {1: [-1.5], 2: [-2.0]}, near)
    write(tmp_path, {1: [-1.25], 2: [-2.5], 3: [-3.0]}, far)
    store = LogpStore.open(tmp_path, SPACE, compatible=[near, far])
    keys = keys_of([1, 2, 3, 4])
    assert store.contains(keys).tolist() == [True, True, True, False]
    assert [row.tolist() for row in store.read(keys[:3])] == [[-1.0], [-2.0], [-3.0]]
    assert store.sources(keys).tolist() == [0, 1, 2, -1]
    again = LogpStore.open(tmp_path, SPACE, store.names)
    assert [row.tolist() for row in again.read(keys[:3])] == [[-1.0], [-2.0], [-3.0]]
    assert open_store(tmp_path).contains(keys).tolist() == [True, False, False, False]
    # What is written goes to the own space only.
    store.write(keys[3:], [values(-4.0)])
    assert open_store(tmp_path).contains(keys).tolist() == [True, False, False, True]


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_never_stored(tmp_path: Path, number: float) -> None:
    with pytest.raises(ReferenceModelError, match="not finite") as raised:
        write(tmp_path, {1: [-1.0], 2: [-1.0, number]})
    assert raised.value.got == "1 of 2 responses"
    assert not open_store(tmp_path).contains(keys_of([1])).any()


def test_a_full_disk_is_told_and_leaves_nothing_half(tmp_path: Path) -> None:
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


def test_a_store_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ReferenceModelError, match="cannot be opened"):
        open_store(tmp_path / "file")


def test_shards_may_be_more_than_files_may_be_open(tmp_path: Path) -> None:
    for name in range(60):
        write(tmp_path, {name: [-float(name)]})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        assert readable(tmp_path, range(60)) == {name: [-float(name)] for name in range(60)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_cannot_be_read_is_no_damaged_one(tmp_path: Path) -> None:
    """To compute anew what is there would be dear, and would not mend it."""
    file = write(tmp_path, ROWS)
    name = f"{SPACE.name}/{file.name}"
    file.unlink()
    file.mkdir()
    with pytest.raises(ReferenceModelError, match="cannot be opened") as raised:
        LogpStore.open(tmp_path, SPACE, [name])
    assert file.name in raised.value.got


def write_many(root: str, writer: int) -> None:
    for number in range(20):
        write(Path(root), {number: [-1.0 - number], 100 * (writer + 1) + number: [-float(writer)]})


def test_processes_write_to_one_store_at_once(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=write_many, args=(str(tmp_path), writer))
        for writer in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = open_store(tmp_path)
    assert store.damaged == []
    names = [*range(20), *range(100, 120), *range(200, 220)]
    rows: list[npt.NDArray[np.float32]] = store.read(keys_of(names))
    assert [row.tolist() for row in rows] == [
        *([-1.0 - number] for number in range(20)),
        *[[0.0]] * 20,
        *[[-1.0]] * 20,
    ]
