"""Inputs of a run on several ranks: rank 0 computes the columns of the data, all map them, all fail alike."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import ParallelismKind
from dpo_dist.distributed.processes.world import World
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.tables import write_table
from dpo_dist.training.start.inputs import load_inputs
from dpo_dist.training.start.open_run import Run
from tests.dist.scenario import Assets
from tests.support.ranks import run_ranks


def digest(data: PreferenceDataset) -> str:
    """Return a digest of what a rank sees of a dataset."""
    columns = (data.keys, data.key_order, data.piece_tokens, data.first_pieces, data.scores, data.origins)
    every = hashlib.blake2b(json.dumps(data.counts).encode())
    for column in columns:
        every.update(np.ascontiguousarray(column).data)
    return every.hexdigest()


@dataclass(frozen=True)
class Starts:
    """Starts of runs on labelled records: twice, and on records of one prompt."""

    model: Path

    def __call__(self, world: World, folder: Path) -> Any:
        rows = [{"completion": f"answer {n}", "label": n % 3 == 0} for n in range(7)]
        files = {"many": [{"prompt": f"q{n}", **row} for n, row in enumerate(rows)]}
        files["one"] = [{"prompt": "q", **row} for row in rows]
        found: list[Any] = []
        for name in ("many", "many", "one"):
            path = folder / f"{name}-{world.rank}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in files[name]))
            config = load_run_config(
                [
                    f"model.path={self.model}",
                    f"data.train=[{folder / f'{name}-0.jsonl'}]",
                    "loss=kto",
                    "trainer.global_batch_pairs=1",
                    f"run.root={folder}",
                ]
            )
            world.barrier()
            built = mock.patch("dpo_dist.foundation.tables.write_table", wraps=write_table)
            with built as writes:
                try:
                    found.append([digest(load_inputs(Run(config, world, Console(None))).train_set)])
                except DataError as error:
                    found.append([str(error)])
                found[-1].append(writes.call_count)
        return found


@pytest.mark.parametrize("size", [2, 3])
def test_rank_0_computes_the_columns_once_and_all_ranks_see_the_same(
    size: int, assets: Assets, tmp_path: Path
) -> None:
    ranks = run_ranks(Starts(assets.policy), size, tmp_path / "ranks", ParallelismKind.ddp)
    [first, second, refused] = zip(*ranks, strict=True)
    assert len({seen for seen, _ in first}) == 1
    assert {seen for seen, _ in second} == {seen for seen, _ in first}
    assert [written for _, written in first] == [2, *[0] * (size - 1)]
    assert [written for _, written in second] == [0] * size
    assert len({message for message, _ in refused}) == 1
    assert "same prompt" in refused[0][0]
