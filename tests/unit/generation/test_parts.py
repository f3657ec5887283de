"""Parts of the work: finished ones are kept, open ones are shared among processes, an error ends all."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.sampling.stages import Parts, work_on

Rows = list[dict[str, Any]]


def stage(folder: Path, settings: Any = "a") -> Parts:
    return Parts.of(folder, "responses", {"setting": settings}, 5)


def process(rank: int, size: int = 2) -> Any:
    """One of several processes that run one after the other."""
    return SimpleNamespace(
        rank=rank,
        size=size,
        together=lambda work, _: work(),
    )


def number(index: int) -> Rows:
    return [{"number": index, "text": "é\u2028"}]


def test_processes_share_the_open_parts(tmp_path: Path) -> None:
    parts = stage(tmp_path)
    assert parts.open() == [0, 1, 2, 3, 4]
    parts.write(1, number(1))
    open_parts = parts.open()
    assert open_parts == [0, 2, 3, 4]
    done: list[list[int]] = [[], []]
    for rank in (0, 1):

        def work(index: int, own: list[int] = done[rank]) -> Rows:
            own.append(index)
            return number(index)

        work_on(parts, open_parts, process(rank), work, lambda _: None)
    assert done == [[0, 3], [2, 4]]
    assert parts.open() == []
    assert parts.finished() == 5
    assert [parts.read(index) for index in range(5)] == [number(index) for index in range(5)]


def test_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    parts = stage(tmp_path)
    parts.open()
    left = parts.folder / "000001.jsonl.tmp-0123456789ab"
    left.touch()
    os.utime(left, (0, 0))
    assert parts.open() == [0, 1, 2, 3, 4]
    assert not left.exists()


def test_other_settings_have_other_parts(tmp_path: Path) -> None:
    parts = stage(tmp_path)
    parts.open()
    parts.write(0, number(0))
    assert stage(tmp_path).open() == [1, 2, 3, 4]
    assert stage(tmp_path, "b").open() == [0, 1, 2, 3, 4]


def test_a_process_stops_at_the_error_of_another_one(tmp_path: Path) -> None:
    parts = stage(tmp_path)
    open_parts, done = parts.open(), list[int]()

    def work(index: int) -> Rows:
        done.append(index)
        if index == 3:
            raise ConfigError("no memory")
        return number(index)

    with pytest.raises(ConfigError, match="no memory"):
        work_on(parts, open_parts, process(1), work, lambda _: None)
    assert done == [1, 3]
    flag = parts.folder / "failed"
    assert flag.exists()
    work_on(parts, open_parts, process(1), work, lambda _: None)
    assert done == [1, 3]
    assert parts.open() == [0, 2, 3, 4], "1 is finished"
    assert not flag.exists()


def test_a_part_that_cannot_be_written_does_not_appear(tmp_path: Path) -> None:
    parts = stage(tmp_path)
    parts.open()
    with pytest.raises(ValueError, match="JSON"):
        parts.write(0, [{"score": float("nan")}])
    assert [file.name for file in parts.folder.iterdir()] == ["settings.json"]
