"""Any number of ranks and jobs, killed or not, fill a store with the model's own log-probs."""

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
from dpo_dist.reference import store as store_module
from dpo_dist.reference.store import LogpStore
from tests.dist.scenario import FINGERPRINT, PAIRS, Assets, fill
from tests.support.ranks import run_ranks, start_ranks

Entries = list[np.ndarray]


def assert_whole(store: Path, assets: Assets, plain_entries: Entries, pairs: int) -> None:
    """Assert that the store has the model's log-probs of the first `pairs`."""
    entries = LogpStore.open(store, FINGERPRINT).read(assets.dataset().keys[: 2 * pairs])
    for entry, plain in zip(entries, plain_entries[: 2 * pairs], strict=True):
        np.testing.assert_allclose(entry, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "pairs"), [(3, 7), (3, 1)])
def test_ranks_share_the_work_and_every_entry_is_the_models(
    size: int, pairs: int, assets: Assets, plain_entries: Entries, tmp_path: Path
) -> None:
    ranks = run_ranks(partial(fill, assets, tmp_path / "store", pairs), size, tmp_path / "ranks")
    assert_whole(tmp_path / "store", assets, plain_entries, pairs)
    for of_rank in ranks:
        assert (of_rank["hits"], of_rank["computed"], of_rank["complete"]) == (0, 2 * pairs, True)
    assert sum(of_rank["entries"] for of_rank in ranks) == 2 * pairs
    if pairs >= size:
        assert all(of_rank["entries"] for of_rank in ranks)
    else:
        assert sum(of_rank["dummies"] > 0 for of_rank in ranks) == size - pairs


def fill_and_die(
    assets: Assets, store: Path, pairs: int, dying: int, world: World, folder: Path
) -> dict[str, Any]:
    """Fill; one rank is killed when half of its second shard is written."""
    if world.rank == dying:
        store_module.save_file = dying_at_call(2, store_module.save_file)
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
    dying: int, assets: Assets, plain_entries: Entries, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    killed = partial(fill_and_die, assets, store, PAIRS, dying)
    outcomes = start_ranks(killed, 2, tmp_path / "killed").finish()
    assert outcomes[dying].exit_code == -signal.SIGKILL
    assert f"rank {dying} of 2 died" in outcomes[1 - dying].message

    left = LogpStore.open(store, FINGERPRINT)
    assert list(left.folder.glob("*.tmp-*")), "the half-written shard should be there, under another name"
    stored = left.contains(assets.dataset().keys)
    assert 0 < stored.sum() == len(left) < 2 * PAIRS
    for response in np.flatnonzero(stored):
        [entry] = left.read(assets.dataset().keys[response : response + 1])
        np.testing.assert_allclose(entry, plain_entries[response], atol=1e-5, rtol=0)

    first, second = run_ranks(partial(fill, assets, store, PAIRS), 2, tmp_path / "again")
    assert_whole(store, assets, plain_entries, PAIRS)
    missing = 2 * PAIRS - len(left)
    assert first["hits"] == len(left)
    assert not list(left.folder.glob("*.tmp-*"))
    assert first["computed"] == first["entries"] + second["entries"] == missing


def fill_slowly(assets: Assets, store: Path, world: World, folder: Path) -> dict[str, Any]:
    """Fill with one pair per rank and round, so slowly that another job comes meanwhile."""

    def slowly(logps: Tensor) -> Tensor:
        time.sleep(0.2)
        return logps

    return fill(assets, store, PAIRS, world, folder, change=slowly, entries_per_shard=2)


def test_of_concurrent_fills_of_one_store_one_computes_and_the_other_waits(
    assets: Assets, plain_entries: Entries, tmp_path: Path
) -> None:
    scenario = partial(fill_slowly, assets, tmp_path / "store")
    worlds = [start_ranks(scenario, size, tmp_path / f"job {size}") for size in (1, 2)]
    computed = []
    for world in worlds:
        for outcome in world.finish():
            assert outcome.error == "", outcome.log
            assert outcome.result["complete"]
            assert outcome.result["hits"] + outcome.result["computed"] == 2 * PAIRS
        computed.append(outcome.result["computed"])
    assert sorted(computed) == [0, 2 * PAIRS]
    assert_whole(tmp_path / "store", assets, plain_entries, PAIRS)


def fill_with_one_broken_rank(assets: Assets, store: Path, world: World, folder: Path) -> dict[str, Any]:
    """Fill; the model of one rank is broken."""
    broken = world.rank == 1
    return fill(assets, store, PAIRS, world, folder, change=lambda logps: logps / (0 if broken else 1))


def test_a_write_error_of_one_rank_is_raised_on_all(assets: Assets, tmp_path: Path) -> None:
    scenario = partial(fill_with_one_broken_rank, assets, tmp_path / "store")
    for outcome in start_ranks(scenario, 2, tmp_path / "ranks").finish():
        assert outcome.error == "ReferenceModelError", outcome.log
        assert "not finite" in outcome.message
    left = LogpStore.open(tmp_path / "store", FINGERPRINT)
    assert 0 < left.contains(assets.dataset().keys).sum() == len(left) < 2 * PAIRS
