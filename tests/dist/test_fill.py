"""Any number of ranks and jobs, killed or not, fill a store with the model's own log-probs."""

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.distributed.processes.world import Stops, World
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.dataset_columns import ScorerPrompts
from dpo_dist.encoded.views import with_views
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.reference import store as store_module
from dpo_dist.reference.fill import Scorer, StoreFiller
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from tests.dist.scenario import PAIRS, Assets, entries_of, load_reference
from tests.support.killed_runs import die_in_shard
from tests.support.packing import COSTS, prefixes_of
from tests.support.ranks import run_ranks, start_ranks

FINGERPRINT = ReferenceFingerprint("tiny", {"dtype": "fp32"})
Entries = list[np.ndarray]


def fill(
    assets: Assets,
    store: Path,
    pairs: int,
    world: World,
    _folder: Path,
    change: Callable[[Tensor], Tensor] = lambda logps: logps,
    entries_per_shard: int = 4,
    read: Callable[[Assets], PreferenceDataset] = Assets.dataset,
) -> dict[str, Any]:
    """Fill `store` for the first `pairs`; return the report and the number of entries this rank scored."""
    dataset = read(assets)
    scored = {"entries": 0, "dummies": 0}

    def load_scorer() -> Scorer:
        engine = load_reference(assets.reference, assets.config(assets.policy), world)

        def score(batch: PackedBatch) -> Tensor:
            scored["entries"] += len(batch.keys)
            scored["dummies"] += not len(batch.keys)
            return change(engine.token_logps(batch))

        return score

    empty = LogpStore(store, FINGERPRINT, [])
    stops = Stops(StopRequest(), world)
    filler = StoreFiller(empty, load_scorer, world, 128, COSTS, entries_per_shard, stops)
    report = filler.fill(dataset, np.arange(pairs), lambda _done, _total: None)
    opened = filler.open_filled()
    complete = bool(opened.contains(dataset.keys[: 2 * pairs]).all())
    found = {"complete": complete, "shards": opened.shards}
    return {"hits": report.hits, "computed": report.computed, **found, **scored}


def assert_whole(store: Path, dataset: PreferenceDataset, plain_entries: Entries, pairs: int) -> None:
    """Assert that the store has the model's log-probs of the first `pairs`."""
    entries = LogpStore.open(store, FINGERPRINT).read(dataset.keys[: 2 * pairs])
    for entry, plain in zip(entries, plain_entries[: 2 * pairs], strict=True):
        np.testing.assert_allclose(entry, plain, atol=1e-5, rtol=0)


def fill_one_and_more(assets: Assets, store: Path, world: World, folder: Path) -> list[dict[str, Any]]:
    """Fill twice; only rank 0 sees the files of others, one of which comes from another run meanwhile."""
    if world.rank:
        store_module.list_shards = lambda _folder: []

    def add_another(logps: Tensor) -> Tensor:
        if world.is_main:
            LogpStore(store, FINGERPRINT, []).write(np.ones((1, 2), np.uint64), [np.zeros(1, np.float32)])
        return logps

    return [fill(assets, store, pairs, world, folder, change=add_another) for pairs in (1, 7)]


def test_ranks_share_the_work_and_every_entry_is_the_models(
    assets: Assets, plain_entries: Entries, tmp_path: Path
) -> None:
    """First of fewer pairs than ranks, then of more; all ranks open the same shards."""
    scenario = partial(fill_one_and_more, assets, tmp_path / "store")
    ones, more = zip(*run_ranks(scenario, 3, tmp_path / "ranks"), strict=True)
    assert_whole(tmp_path / "store", assets.dataset(), plain_entries, 7)
    for fills, hits, computed in ((ones, 0, 2), (more, 2, 12)):
        for of_rank in fills:
            assert (of_rank["hits"], of_rank["computed"], of_rank["complete"]) == (hits, computed, True)
            assert of_rank["shards"] == fills[0]["shards"]
        assert sum(of_rank["entries"] for of_rank in fills) == computed
    assert sum(of_rank["dummies"] > 0 for of_rank in ones) == 2
    assert all(of_rank["entries"] for of_rank in more)


def fill_in_order(assets: Assets, store: Path, shares: bool, world: World, _folder: Path) -> dict[str, Any]:
    """Fill for pairs whose beginnings are known; return the tokens that this rank scored, and the calls."""
    tokens = list[int]()
    dataset = assets.dataset()
    dataset = replace(dataset, prefixes=prefixes_of([dataset.example(i) for i in range(len(dataset))]))

    def load_scorer() -> Scorer:
        engine = load_reference(assets.reference, assets.config(assets.policy), world)

        def score(batch: PackedBatch) -> Tensor:
            tokens.append(batch.tokens)
            return engine.token_logps(batch)

        return score

    costs = replace(COSTS, beyond_prompts=shares)
    filler = StoreFiller(
        LogpStore(store, FINGERPRINT, []), load_scorer, world, 512, costs, 4096, Stops(StopRequest(), world)
    )
    filler.fill(dataset, np.arange(PAIRS), lambda _done, _total: None)
    return {"tokens": sum(tokens), "calls": len(tokens)}


@pytest.mark.parametrize("ranks", [2, 3])
def test_pairs_that_begin_alike_are_scored_by_one_rank(
    assets: Assets, plain_entries: Entries, tmp_path: Path, ranks: int
) -> None:
    """A chat template begins all of them."""
    tokens = []
    for shares in (True, False):
        store = tmp_path / str(shares)
        found = run_ranks(partial(fill_in_order, assets, store, shares), ranks, tmp_path / f"ranks {shares}")
        assert_whole(store, assets.dataset(), plain_entries, PAIRS)
        assert len({of_rank["calls"] for of_rank in found}) == 1
        assert max(of_rank["tokens"] for of_rank in found) < 2 * min(of_rank["tokens"] for of_rank in found)
        tokens.append(sum(of_rank["tokens"] for of_rank in found))
    assert tokens[0] < tokens[1]


def other_prompts(assets: Assets) -> PreferenceDataset:
    """The view of a reference that reads another prompt in every second pair."""
    dataset = assets.dataset()
    lengths = np.where(np.arange(len(dataset)) % 2, 0, 9).astype(np.int32)
    ids = pa.chunked_array([np.arange(9, 9 + lengths.sum(), dtype=np.int32) % 90])
    prompts = ScorerPrompts(ids, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)
    return with_views(replace(dataset, scorer_prompts={"reference": prompts}), {"reference"}).view(
        "reference"
    )


def fill_and_die(
    assets: Assets, store: Path, read: Callable[[Assets], PreferenceDataset], world: World, folder: Path
) -> dict[str, Any]:
    """Fill; rank 1 is killed when half of its second shard is written."""
    if world.rank == 1:
        die_in_shard(2)
    return fill(assets, store, PAIRS, world, folder, read=read)


@pytest.mark.parametrize("read", [Assets.dataset, other_prompts], ids=["own prompts", "other prompts"])
def test_a_killed_fill_keeps_its_shards_and_the_next_computes_the_rest(
    assets: Assets, tmp_path: Path, read: Callable[[Assets], PreferenceDataset]
) -> None:
    store = tmp_path / "store"
    dataset = read(assets)
    outcomes = start_ranks(partial(fill_and_die, assets, store, read), 2, tmp_path / "killed").finish()
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert "rank 1 of 2 died" in outcomes[0].message

    assert list(store.glob("*/*.tmp-*")), "the half-written shard should be there, under another name"
    left = LogpStore.open(store, FINGERPRINT)
    stored = left.contains(dataset.keys)
    assert 0 < stored.sum() == len(left) < 2 * PAIRS

    first, second = run_ranks(partial(fill, assets, store, PAIRS, read=read), 2, tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(assets.reference, dtype=torch.float32)
    assert_whole(store, dataset, entries_of(model, dataset), PAIRS)
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
    assert_whole(tmp_path / "store", assets.dataset(), plain_entries, PAIRS)


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
