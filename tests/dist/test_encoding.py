"""Ranks share the parts of the data that are not encoded yet, and end with one error."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpo_dist.data import encode as encode_module
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.distributed.processes.world import World
from dpo_dist.encoded import build
from dpo_dist.encoded.build import Preparation
from dpo_dist.foundation.errors import DataError
from dpo_dist.training.start.inputs import encode_together
from tests.support import tiny
from tests.support.cache import encoded_folders
from tests.support.ranks import run_ranks
from tests.support.records import jsonl

PART = 4
FAILS = "a prompt that cannot be encoded"


def encode(sources: list[SourceConfig], cache: Path, world: World, _folder: Path) -> dict[str, Any]:
    """Encode with the other ranks; return this rank's records, and the files or the error."""
    seen: list[str] = []
    encode_pair = encode_module.encode_pair

    def spy(record: Any, *rest: Any) -> Any:
        seen.append(record.prompt)
        if record.prompt == FAILS:
            raise DataError("no template", where=str(record.origin), got="a record", remedy="set one")
        return encode_pair(record, *rest)

    config = DataConfig(cache=str(cache))
    with (
        mock.patch.object(encode_module, "encode_pair", spy),
        mock.patch.multiple(build, PART_RECORDS=PART, CHUNK_RECORDS=2),
    ):
        try:
            made = encode_together(world, Preparation(sources, config, tiny.qwen(), "qwen"))
        except DataError as error:
            return {"seen": seen, "error": error.where}
    return {"seen": seen, "files": [source.file.name for source in made]}


def source_of(folder: Path, *rows: Any) -> SourceConfig:
    folder.mkdir()
    return SourceConfig(jsonl(folder, *rows))


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_part_is_encoded_by_one_rank(ranks: int, tmp_path: Path) -> None:
    """Two sources: one of seven parts, of which the last is not whole, and one of a single part."""
    rows = [{"prompt": f"q {n}", "chosen": "right", "rejected": "wrong"} for n in range(6 * PART + 3)]
    sources = [source_of(tmp_path / "long", *rows), source_of(tmp_path / "short", *rows[:2])]
    found = run_ranks(partial(encode, sources, tmp_path / "cache"), ranks, tmp_path / "ranks")
    for rank, of_rank in enumerate(found):
        mine = [row["prompt"] for n, row in enumerate(rows) if n // PART % ranks == rank]
        assert of_rank["seen"] == mine + [row["prompt"] for row in rows[:2]] * (rank == 0)
        assert of_rank["files"] == found[0]["files"]
    assert not [name for name in encoded_folders(tmp_path) if "-part-" in name]
    config = DataConfig(cache=str(tmp_path / "alone"))
    alone = Preparation(sources, config, tiny.qwen(), "qwen").whole()
    for source, name in zip(alone, found[0]["files"], strict=True):
        assert source.file.read_bytes() == (tmp_path / "cache" / name).read_bytes()


def test_the_error_of_one_rank_ends_all(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"q {n}", "chosen": "right", "rejected": "wrong"} for n in range(3 * PART)]
    rows[PART + 1]["prompt"] = FAILS
    source = source_of(tmp_path / "data", *rows)
    found = run_ranks(partial(encode, [source], tmp_path / "cache"), 2, tmp_path / "ranks")
    assert [of_rank["error"] for of_rank in found] == [f"{source.path}:{PART + 2}"] * 2
