"""Prompts and parts of the work: by contents, shared among processes, kept, ended by an error."""

import itertools
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.pairs import run
from dpo_dist.generation.pairs.run import write_prompts
from dpo_dist.generation.sampling.stages import Parts, Stages
from tests.support.records import jsonl


def written(folder: Path, records: list[Any], *overrides: str) -> list[list[str]]:
    """Return the prompts of each part."""
    config = load_run_config(["model.path=m", f"data.train=[{jsonl(folder, *records)}]", *overrides])
    parts = write_prompts(folder, config, lambda _: None)
    return [[row["prompt"] for row in parts.read(index)] for index in range(parts.count)]


def test_parts_of_prompts_share_none_and_together_are_all(tmp_path: Path) -> None:
    def lines(*overrides: str) -> list[str]:
        records = [{"prompt": f"question {n % 50}", "completion": "c"} for n in range(60)]
        return [*itertools.chain(*written(tmp_path, records, *overrides))]

    whole = lines()
    parts = [lines("pairs.prompt_parts=3", f"pairs.prompt_part={index}") for index in range(3)]
    assert len(whole) == 50
    assert sorted(line for part in parts for line in part) == sorted(whole)
    assert all(8 < len(part) < 25 for part in parts)
    assert lines("pairs.prompt_parts=3", "pairs.prompt_part=1", "pairs.limit=5") == parts[1][:5]


def abandoned(file: Path) -> Path:
    left = file.with_name(f"{file.name}.tmp-0123456789ab")
    left.touch()
    os.utime(left, (0, 0))
    return left


def test_every_part_has_its_own_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"question {n} " + "\u2028é" * (n % 7) for n in range(23)]
    for size in (5, 23, 1, 100):
        monkeypatch.setattr(run, "PART_PROMPTS", size)
        found = written(tmp_path, [{"prompt": text, "completion": "c"} for text in texts])
        assert found == [texts[start : start + size] for start in range(0, 23, size)]


def stage(folder: Path, settings: Any = "a") -> Parts:
    return Parts.of(folder, "responses", {"setting": settings}, 5)


def work(parts: Parts, open_parts: list[int], rank: int, fails: int | None = None) -> list[int]:
    """Do the share of one of two processes, one after the other; return the parts begun."""
    world: Any = SimpleNamespace(
        rank=rank, size=2, is_main=False, on_main=lambda *_: open_parts, together=lambda work: work()
    )
    screen: Any = SimpleNamespace(heartbeat=lambda _: nullcontext(), progress=lambda *_: nullcontext())
    done = []

    def part(index: int) -> list[dict[str, Any]]:
        done.append(index)
        if index == fails:
            raise ConfigError("no memory")
        return number(index)

    with nullcontext() if fails is None else pytest.raises(ConfigError):
        Stages(world, screen, "").finish("responses", parts, part)
    return done


def number(index: int) -> list[dict[str, Any]]:
    return [{"number": index, "text": "é\u2028"}]


def test_processes_share_the_open_parts(tmp_path: Path) -> None:
    parts = stage(tmp_path)
    assert parts.open() == [0, 1, 2, 3, 4]
    left = abandoned(parts.file(1))
    parts.write(1, number(1))
    open_parts = parts.open()
    assert not left.exists()
    assert open_parts == stage(tmp_path).open() == [0, 2, 3, 4]
    assert [work(parts, open_parts, rank) for rank in (0, 1)] == [[0, 3], [2, 4]]
    assert parts.open() == []
    assert parts.finished() == 5
    assert [parts.read(index) for index in range(5)] == [number(index) for index in range(5)]
    assert stage(tmp_path, "b").open() == [0, 1, 2, 3, 4], "other settings have other parts"


def test_a_process_stops_at_the_error_of_another_one(tmp_path: Path) -> None:
    parts = stage(tmp_path)
    open_parts = parts.open()
    assert work(parts, open_parts, 1, fails=3) == [1, 3]
    assert work(parts, open_parts, 0) == []
    assert parts.open() == [0, 2, 3, 4], "1 is finished"
    assert work(parts, parts.open(), 0) == [0, 3]
