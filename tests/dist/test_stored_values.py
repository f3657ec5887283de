"""Law L3 over world sizes: whichever ranks filled a store, a run reads its own reference's log-probs."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.distributed.world import World
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.engine import load_reference
from dpo_dist.reference.fill import StoreFiller
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.store import LogpStore
from tests.dist.scenario import PAIRS, Assets, files_of
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import run_ranks

Run = tuple[str, list[int], int, int]
"""Model, pairs in their order, tokens of a micro-batch, entries of a shard."""

_WORLDS = (2, 1, 2)


def random_runs(seed: int) -> list[list[Run]]:
    """Return a few runs for each world."""
    generator = np.random.default_rng(seed)

    def run() -> Run:
        pairs = generator.permutation(PAIRS)[: generator.integers(1, PAIRS + 1)].tolist()
        model = str(generator.choice(["policy", "reference"]))
        return model, pairs, int(generator.integers(90, 300)), int(generator.integers(1, 12))

    return [[run() for _ in range(2)] for _ in _WORLDS]


def carry_out(
    assets: Assets, store: Path, runs: list[Run], world: World, _folder: Path
) -> list[dict[str, Any]]:
    """Fill the store for each run; return the entries that this rank then reads."""
    results = []
    for model, pairs, micro_batch_tokens, entries_per_shard in runs:
        folder = getattr(assets, model)
        fingerprint = ReferenceFingerprint(
            world.on_main(partial(digest_model, folder, store)).digest, {"dtype": "fp32"}
        )
        dataset = assets.dataset()
        engine = load_reference(files_of(folder), assets.config(folder), world)
        filler = StoreFiller(
            LogpStore(store, [fingerprint], []),
            lambda engine=engine: engine.token_logps,
            world,
            micro_batch_tokens,
            COSTS,
            entries_per_shard,
        )
        report = filler.fill(dataset, np.array(pairs), lambda _done, _total: None)
        engine.free()
        entries = filler.open_filled().read(dataset.keys[dataset.response_indices(np.array(pairs))])
        results.append(
            {"found": report.hits, "computed": report.computed, "entries": [e.tolist() for e in entries]}
        )
    return results


@torch.no_grad()
def test_worlds_of_any_size_read_the_log_probs_of_their_own_reference(assets: Assets, tmp_path: Path) -> None:
    dataset = assets.dataset()
    wanted: dict[str, list[np.ndarray]] = {}
    for model in ("policy", "reference"):
        causal_lm = AutoModelForCausalLM.from_pretrained(getattr(assets, model), dtype=torch.float32)
        wanted[model] = [
            plain_logps(causal_lm, [dataset.sequences(index, (which,))]).numpy()
            for index in range(PAIRS)
            for which in range(2)
        ]
    seen: set[tuple[str, int]] = set()
    for number, (size, runs) in enumerate(zip(_WORLDS, random_runs(seed=3), strict=True)):
        scenario = partial(carry_out, assets, tmp_path / "store", runs)
        ranks = run_ranks(scenario, size, tmp_path / f"world {number}")
        assert all(results == ranks[0] for results in ranks), "every rank reads the same"
        for (model, pairs, *_), result in zip(runs, ranks[0], strict=True):
            new = {(model, pair) for pair in pairs} - seen
            assert result["computed"] == 2 * len(new)
            assert result["found"] == 2 * (len(pairs) - len(new))
            seen |= new
            responses = [2 * pair + which for pair in pairs for which in range(2)]
            for entry, response in zip(result["entries"], responses, strict=True):
                np.testing.assert_allclose(entry, wanted[model][response], atol=1e-5, rtol=0)
