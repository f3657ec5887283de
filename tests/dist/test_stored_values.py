"""Law L3 over worlds: whatever ranks filled a store before, a run is served its own reference's values."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.distributed.world import World
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.engine import load_reference
from dpo_dist.reference.fill import fill_store, open_filled
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.store import LogpStore
from tests.dist.scenario import PAIRS, Assets
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import run_ranks

Run = tuple[str, list[int], int, int]
"""The model, the pairs in their order, tokens of a micro-batch, rows of a shard."""

_WORLDS = (2, 1, 2)


def random_runs(seed: int) -> list[list[Run]]:
    """For each world a few runs."""
    generator = np.random.default_rng(seed)

    def run() -> Run:
        pairs = generator.permutation(PAIRS)[: generator.integers(1, PAIRS + 1)].tolist()
        model = str(generator.choice(["policy", "reference"]))
        return model, pairs, int(generator.integers(90, 300)), int(generator.integers(1, 12))

    return [[run() for _ in range(2)] for _ in _WORLDS]


def carry_out(
    assets: Assets, store: Path, runs: list[Run], world: World, _folder: Path
) -> list[dict[str, Any]]:
    """Fill the store for each run, and give what this rank is served then."""
    told = []
    for model, pairs, micro_batch_tokens, rows_per_shard in runs:
        folder = getattr(assets, model)
        space = ReferenceFingerprint(world.on_main(partial(digest_model, folder, store)).digest, {"dtype": "fp32"})
        dataset = assets.dataset()
        open_store = partial(LogpStore.open, store, space)
        engine = load_reference(folder, assets.config(folder), world)
        report = fill_store(
            open_store,
            dataset,
            np.array(pairs),
            lambda engine=engine: engine.token_logps,
            world,
            micro_batch_tokens,
            COSTS,
            rows_per_shard,
            lambda _done, _total: None,
        )
        engine.free()
        rows = open_filled(open_store, report.shards, world).read(dataset.keys[dataset.response_indices(np.array(pairs))])
        told.append({"found": report.hits, "computed": report.computed, "rows": [r.tolist() for r in rows]})
    return told


@torch.no_grad()
def test_worlds_of_any_size_are_served_what_their_reference_says(assets: Assets, tmp_path: Path) -> None:
    dataset = assets.dataset()
    wanted: dict[str, list[np.ndarray]] = {}
    for model in ("policy", "reference"):
        causal_lm = AutoModelForCausalLM.from_pretrained(getattr(assets, model), dtype=torch.float32)
        wanted[model] = [
            plain_logps(causal_lm, [dataset.sequences(row, (which,))]).numpy()
            for row in range(PAIRS)
            for which in range(2)
        ]
    seen: set[tuple[str, int]] = set()
    for number, (size, runs) in enumerate(zip(_WORLDS, random_runs(seed=3), strict=True)):
        scenario = partial(carry_out, assets, tmp_path / "store", runs)
        ranks = run_ranks(scenario, size, tmp_path / f"world {number}")
        assert all(told == ranks[0] for told in ranks), "every rank is served the same"
        for (model, pairs, *_), told in zip(runs, ranks[0], strict=True):
            new = {(model, pair) for pair in pairs} - seen
            assert told["computed"] == 2 * len(new)
            assert told["found"] == 2 * (len(pairs) - len(new))
            seen |= new
            places = [2 * pair + which for pair in pairs for which in range(2)]
            for row, place in zip(told["rows"], places, strict=True):
                np.testing.assert_allclose(row, wanted[model][place], atol=1e-5, rtol=0)
