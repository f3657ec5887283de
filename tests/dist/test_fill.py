"""The store is filled by any number of ranks and worlds, killed or not, and every row is the model's own."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from dpo_dist.distributed.world import World
from dpo_dist.reference import shard as shard_module
from dpo_dist.reference.store import LogpStore
from tests.dist.scenario import PAIRS, SPACE, Assets, fill
from tests.support.ranks import run_ranks, start_ranks

Entries = list[np.ndarray]


def assert_whole(store: Path, assets: Assets, plain_rows: Entries, pairs: int) -> None:
    """Every row of the first `pairs` is there and is what the model says."""
    rows = LogpStore.open(store, SPACE).read(assets.dataset().keys[: 2 * pairs])
    for row, plain in zip(rows, plain_rows[: 2 * pairs], strict=True):
        np.testing.assert_allclose(row, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "pairs"), [(2, 11), (3, 7), (3, 1)])
def test_ranks_share_the_work_and_every_row_is_the_models(
    size: int, pairs: int, assets: Assets, plain_rows: Entries, tmp_path: Path
) -> None:
    told = run_ranks(partial(fill, assets, tmp_path / "store", pairs), size, tmp_path / "ranks")
    assert_whole(tmp_path / "store", assets, plain_rows, pairs)
    for of_rank in told:
        assert (of_rank["hits"], of_rank["computed"], of_rank["complete"]) == (0, 2 * pairs, True)
    assert sum(of_rank["rows"] for of_rank in told) == 2 * pairs
    if pairs >= size:
        assert all(of_rank["rows"] for of_rank in told)
    else:
        assert sum(of_rank["dummies"] > 0 for of_rank in told) == size - pairs


def fill_and_die(
    assets: Assets, store: Path, pairs: int, dying: int, world: World, folder: Path
) -> dict[str, Any]:
    """Fill, and have one rank killed when half of its second shard is written."""
    if world.rank == dying:
        shard_module.save_file = dying_at_call(2, shard_module.save_file)
    return fill(assets, store, pairs, world, folder)


def dying_at_call(number: int, save_file: Callable[..., None]) -> Callable[..., None]:
    calls = []

    def save(tensors: dict[str, np.ndarray], file: Path) -> None:
        calls.append(file)
        save_file(tensors, file)
        if len(calls) == number:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return save


@pytest.mark.parametrize("dying", [0, 1])
def test_a_killed_fill_keeps_its_shards_and_the_next_computes_the_rest(
    dying: int, assets: Assets, plain_rows: Entries, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    killed = partial(fill_and_die, assets, store, PAIRS, dying)
    outcomes = start_ranks(killed, 2, tmp_path / "killed").finish()
    assert outcomes[dying].exit_code == -signal.SIGKILL
    assert f"rank {dying} of 2 died" in outcomes[1 - dying].told

    left = LogpStore.open(store, SPACE)
    assert list(left.folder.glob("*.tmp-*")), "the half-written shard should be there, under another name"
    held = left.contains(assets.dataset().keys)
    assert 0 < held.sum() == len(left) < 2 * PAIRS
    for place in np.flatnonzero(held):
        [row] = left.read(assets.dataset().keys[place : place + 1])
        np.testing.assert_allclose(row, plain_rows[place], atol=1e-5, rtol=0)

    told = run_ranks(partial(fill, assets, store, PAIRS), 2, tmp_path / "again")
    assert_whole(store, assets, plain_rows, PAIRS)
    missing = 2 * PAIRS - len(left)
    assert told[0]["hits"] == len(left)
    assert not list(left.folder.glob("*.tmp-*"))
    assert told[0]["computed"] == told[0]["rows"] + told[1]["rows"] == missing


def fill_with_one_broken_rank(assets: Assets, store: Path, world: World, folder: Path) -> dict[str, Any]:
    """Fill, where one rank's model has gone wrong."""
    broken = world.rank == 1
    return fill(assets, store, PAIRS, world, folder, change=lambda logps: logps / (0 if broken else 1))


def test_rows_that_one_rank_cannot_write_are_every_rank_s_error(assets: Assets, tmp_path: Path) -> None:
    scenario = partial(fill_with_one_broken_rank, assets, tmp_path / "store")
    for outcome in start_ranks(scenario, 2, tmp_path / "ranks").finish():
        assert outcome.error == "ReferenceModelError", outcome.log
        assert "not finite" in outcome.told
    left = LogpStore.open(tmp_path / "store", SPACE)
    assert 0 < left.contains(assets.dataset().keys).sum() == len(left) < 2 * PAIRS


def fill_beside_others(
    assets: Assets, store: Path, meeting: Path, worlds: int, world: World, folder: Path
) -> dict[str, Any]:
    """Fill, a pair of each rank a round, and score only when every world has found the store empty."""

    def meet() -> None:
        (meeting / folder.name).touch()
        while len(list(meeting.iterdir())) < worlds:
            time.sleep(0.01)

    def slowly(logps: Tensor) -> Tensor:
        time.sleep(0.05)
        return logps

    return fill(assets, store, PAIRS, world, folder, meet, slowly, rows_per_shard=2)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2)])
def test_fills_of_one_store_at_once_share_the_work_and_all_end_with_all_rows(
    sizes: tuple[int, ...], assets: Assets, plain_rows: Entries, tmp_path: Path
) -> None:
    store, meeting = tmp_path / "store", tmp_path / "meeting"
    meeting.mkdir()
    scenario = partial(fill_beside_others, assets, store, meeting, len(sizes))
    worlds = [start_ranks(scenario, size, tmp_path / f"job {job}") for job, size in enumerate(sizes)]
    computed = []
    for world in worlds:
        for outcome in world.finish():
            assert outcome.error == "", outcome.log
            assert outcome.result["complete"]
            assert outcome.result["hits"] + outcome.result["computed"] == 2 * PAIRS
        computed.append(outcome.result["computed"])
    assert all(computed)
    assert 2 * PAIRS <= sum(computed) < 1.8 * 2 * PAIRS
    assert_whole(store, assets, plain_rows, PAIRS)
