"""Sources encoded in parts: the same file as in one, whoever encodes them; finished parts survive a kill."""

import contextlib
import errno
import fcntl
import itertools
import multiprocessing
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpo_dist.data import encode as encode_module
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.encoded import build, store
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.store import EncodedSource
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import locked
from tests.support import tiny
from tests.support.cache import encoded_folders
from tests.support.read_only import read_only
from tests.support.records import jsonl

PART, CHUNK = 4, 2
BAD = {"prompt": "q", "chosen": "same", "rejected": "same"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PART_RECORDS", PART)
    monkeypatch.setattr(build, "CHUNK_RECORDS", CHUNK)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of the records that are encoded."""
    seen: list[str] = []
    encode = encode_module.encode_pair

    def spy(record: Any, *rest: Any) -> Any:
        seen.append(str(record.prompt))
        return encode(record, *rest)

    monkeypatch.setattr(encode_module, "encode_pair", spy)
    return seen


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"q {n}", "chosen": "right " * (n % 5 + 1), "rejected": "wrong"} for n in range(count)]


def source_of(folder: Path, count: int) -> SourceConfig:
    return SourceConfig(jsonl(folder, *rows(count)[:-1], *[BAD] * (count > 0)))


def preparation(source: SourceConfig, cache: Path, **data: Any) -> Preparation:
    return Preparation([source], DataConfig(cache=str(cache), **data), tiny.qwen(), "qwen")


def whole(source: SourceConfig, cache: Path) -> list[str]:
    """The records of a source that is encoded as one part."""
    with mock.patch.object(build, "PART_RECORDS", 1000):
        one = preparation(source, cache)
        planned = one.plan()
        [made] = one.join(planned, one.encode(planned))
    return records_of(made)


def records_of(made: EncodedSource) -> list[str]:
    """The encoded records; as texts, so that nan is equal to itself."""
    table = made.table()
    assert table is not None
    return list(map(str, table.to_pylist()))


def parts_in(folder: Path) -> list[str]:
    return [name for name in encoded_folders(folder) if "-part-" in name and name.endswith(".arrow")]


@pytest.mark.parametrize("count", [0, 1, PART, PART + 1, 3 * PART - 1, 5 * PART])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_of_parts_make_the_file_of_one_part(count: int, ranks: int, tmp_path: Path) -> None:
    source = source_of(tmp_path, count)
    one = preparation(source, tmp_path / "cache")
    planned = one.plan()
    for rank in reversed(range(ranks)):
        parts = one.encode(planned, (rank, ranks))
        assert parts == [-(-count // PART)]
    made = one.join(planned, parts)
    assert records_of(made[0]) == whole(source, tmp_path / "whole")
    assert parts_in(tmp_path) == []
    assert [each.is_encoded for each in one.plan()] == [True]


def encode_and_die(folder: Path, source: SourceConfig, last: int) -> None:
    """Encode until a record, and be killed there."""
    encode = encode_module.encode_pair

    def dying(record: Any, *rest: Any) -> Any:
        if record.prompt == f"q {last}":
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(record, *rest)

    with mock.patch.object(encode_module, "encode_pair", dying):
        one = preparation(source, folder / "cache")
        one.encode(one.plan())


def test_a_kill_loses_the_part_in_work_only(tmp_path: Path, encoded: list[str]) -> None:
    source = source_of(tmp_path, 5 * PART)
    child = multiprocessing.get_context("fork").Process(
        target=encode_and_die, args=(tmp_path, source, 2 * PART + 3)
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert len(parts_in(tmp_path)) == 2
    one = preparation(source, tmp_path / "cache")
    planned = one.plan()
    made = one.join(planned, one.encode(planned))
    assert made
    assert encoded == [*(f"q {number}" for number in range(2 * PART, 5 * PART - 1))]
    assert records_of(made[0]) == whole(source, tmp_path / "whole")
    assert parts_in(tmp_path) == []


def test_parts_that_a_slower_process_writes_after_the_join_are_removed(tmp_path: Path) -> None:
    one = preparation(source_of(tmp_path, 2 * PART), tmp_path / "cache")
    planned = one.plan()
    assert one.join(planned, one.encode(planned))
    one.encode(planned)
    assert len(parts_in(tmp_path)) == 2
    assert one.join(one.plan(), [0])
    assert parts_in(tmp_path) == []


def test_parts_in_a_read_only_cache_stay(tmp_path: Path) -> None:
    one = preparation(source_of(tmp_path, 2 * PART), tmp_path / "cache")
    planned = one.plan()
    assert one.join(planned, one.encode(planned))
    one.encode(planned)
    planned[0].target.copies.mkdir()
    with read_only(tmp_path / "cache"):
        assert one.join(one.plan(), [0])


def test_a_damaged_part_is_encoded_again(tmp_path: Path, encoded: list[str]) -> None:
    source = source_of(tmp_path, 3 * PART)
    one = preparation(source, tmp_path / "cache")
    planned = one.plan()
    parts = one.encode(planned)
    part = tmp_path / "cache" / parts_in(tmp_path)[1]
    content = bytearray(part.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    part.write_bytes(content)
    encoded.clear()
    with pytest.raises(DataError, match=r"parts .* damaged"):
        one.join(planned, parts)
    assert one.join(planned, one.encode(planned))
    assert encoded == [f"q {number}" for number in range(PART, 2 * PART)]


def test_a_join_waits_for_another_one_and_takes_what_it_made(tmp_path: Path) -> None:
    source = source_of(tmp_path, 3 * PART)
    one = preparation(source, tmp_path / "cache")
    planned = one.plan()
    parts = one.encode(planned)
    lock = planned[0].target.file.with_suffix(".lock")
    with ThreadPoolExecutor(1) as pool:
        with locked(lock, "joins"):
            joined = pool.submit(one.join, planned, parts)
            with pytest.raises(TimeoutError):
                joined.result(0.5)
        assert joined.result(60)
    one.encode(planned, (1, 3))  # by a process that did not see the end of the first join
    assert one.join(planned, parts)
    assert encoded_folders(tmp_path) == sorted(
        [planned[0].target.file.name, planned[0].target.order_file.name]
    )


def test_joins_exclude_each_other_also_after_one_that_found_a_part_missing(tmp_path: Path) -> None:
    """Else the first of two joins would remove the parts that the other one reads."""
    one = preparation(source_of(tmp_path, 3 * PART), tmp_path / "cache")
    planned = one.plan()
    parts, lock = one.encode(planned, (0, 2)), planned[0].target.file.with_suffix(".lock")
    with lock.open("a") as waiting:
        with pytest.raises(DataError, match="missing or damaged"):
            one.join(planned, parts)
        fcntl.flock(waiting, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="joins"), locked(lock, "joins"):
            pass


def test_joins_without_locks_give_the_source_whenever_another_process_joins(tmp_path: Path) -> None:
    """Some file systems have no locks: then the parts may be removed at any moment."""
    source, read, moments = source_of(tmp_path, 2 * PART), store.map_table, 0
    wanted = whole(source, tmp_path / "whole")
    for moment in itertools.count(1):
        one, calls = preparation(source, tmp_path / f"cache{moment}"), itertools.count(1)
        planned = one.plan()
        parts = one.encode(planned)

        def overtaken(*file: Any) -> Any:
            if next(calls) == moment:  # noqa: B023
                with mock.patch.object(store, "map_table", read):
                    assert one.join(planned, parts)  # noqa: B023
            return read(*file)

        with (
            mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "no locks")),
            mock.patch.object(store, "map_table", overtaken),
        ):
            made = one.join(planned, parts)
        assert made
        assert records_of(made[0]) == wanted
        if next(calls) <= moment:
            break
        moments += 1
    assert moments > 2 * 3


def test_parts_of_other_settings_or_of_changed_data_are_not_used(tmp_path: Path, encoded: list[str]) -> None:
    source = source_of(tmp_path, 3 * PART)
    for changed in ({}, {"max_length": 99}):
        one = preparation(source, tmp_path / "cache", **changed)
        one.encode(one.plan())
    assert len(parts_in(tmp_path)) == 6
    path = Path(source.path)
    path.write_text(path.read_text().replace("right", "wright"))
    encoded.clear()
    one = preparation(source, tmp_path / "cache")
    one.encode(one.plan())
    assert len(encoded) == 3 * PART - 1


def test_data_that_change_meanwhile_commit_no_further_part(tmp_path: Path, monkeypatch: Any) -> None:
    source = source_of(tmp_path, 3 * PART)
    encode = encode_module.encode_pair

    def changing(record: Any, *rest: Any) -> Any:
        if record.prompt == f"q {PART + CHUNK}":
            jsonl(tmp_path, *rows(2))
        return encode(record, *rest)

    monkeypatch.setattr(encode_module, "encode_pair", changing)
    one = preparation(source, tmp_path / "cache")
    planned = one.plan()
    with pytest.raises(DataError, match="changed while they were read"):
        one.encode(planned)
    assert len(parts_in(tmp_path)) == 1


def test_a_rank_that_sees_other_data_than_were_planned_encodes_nothing(tmp_path: Path) -> None:
    one = preparation(source_of(tmp_path, 3 * PART), tmp_path / "cache")
    planned = one.plan()
    source_of(tmp_path, 3 * PART - 1)
    with pytest.raises(DataError, match="others on this node"):
        one.encode(planned, (1, 2))
    assert parts_in(tmp_path) == []


def test_an_error_of_a_record_keeps_the_parts_before(tmp_path: Path, monkeypatch: Any) -> None:
    source = source_of(tmp_path, 3 * PART)
    encode = encode_module.encode_pair

    def failing(record: Any, *rest: Any) -> Any:
        if record.prompt == f"q {3 * PART - 2}":
            raise DataError("no template", where=str(record.origin), got="a record", remedy="set one")
        return encode(record, *rest)

    monkeypatch.setattr(encode_module, "encode_pair", failing)
    one = preparation(source, tmp_path / "cache")
    with pytest.raises(DataError, match="no template") as raised:
        one.encode(one.plan())
    assert raised.value.where == f"{source.path}:{3 * PART - 1}"
    assert len(parts_in(tmp_path)) == 2


def test_progress_counts_the_records_of_the_share_that_are_encoded(tmp_path: Path) -> None:
    """Of 5 parts and a half, the first share has three."""
    source, shown = source_of(tmp_path, 5 * PART + 2), list[tuple[int, ...]]()
    progress = mock.Mock(return_value=contextlib.nullcontext(lambda *numbers: shown.append(numbers)))
    one = replace(preparation(source, tmp_path / "cache"), progress=progress)
    one.encode(one.plan(), (0, 2))
    assert shown == [(done,) for done in range(CHUNK, 3 * PART + 1, CHUNK)]
    shown.clear()
    (tmp_path / "cache" / parts_in(tmp_path)[1]).unlink()
    one.encode(one.plan(), (0, 2))
    assert shown == [(CHUNK,), (2 * CHUNK,)]
