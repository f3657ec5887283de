"""Under ZeRO-3 every kind of forward keeps its recorded gather order."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from deepspeed.runtime.zero import partitioned_param_coordinator as gathering

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig
from dpo_dist.data.dataset import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.generation.sampling.generate import Request, Sampling, generate_together
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.step import Objective, evaluate
from tests.dist.scenario import Assets, load_policy, one_step
from tests.support.packing import COSTS
from tests.support.ranks import run_ranks

# The token budgets of steps and what follows them: many micro-batches, one, many.
BUDGETS = (64, 8192, 64)
ROWS = np.arange(6)
PROMPTS = [Request(np.array([100, 101], np.int32), "key", 0)]


# The adapter's base is the reference; a coupled loss scores a batch twice.
CASES = {
    "sigmoid, adapter": (LossConfig(), AdapterConfig(r=2)),
    "aot, whole": (LossConfig(LossKind.aot, reference_free=True), None),
}


def train(assets: Assets, world: World, _folder: Path) -> dict[str, Any]:
    return {name: counts(assets, world, *case) for name, case in CASES.items()}


def counts(assets: Assets, world: World, loss: LossConfig, adapter: AdapterConfig | None) -> dict[str, Any]:
    """Return counts after steps with evaluation and samples: micro-batches, lost records, comparisons."""
    policy = load_policy(ModelConfig(str(assets.policy), dtype=Dtype.fp32, adapter=adapter), world)
    reference: ReferenceProvider = (
        ReferenceProvider() if adapter is None else ReferenceProvider(policy=policy)
    )
    objective, dataset = Objective(loss, reference), assets.dataset()
    coordinator, micro_batches, comparisons = gathering.PartitionedParameterCoordinator, [], []
    discard, compare = coordinator._invalidate_trace, gathering.assert_ints_same_as_other_ranks
    with (
        mock.patch.object(coordinator, "_invalidate_trace", autospec=True, side_effect=discard) as discarded,
        mock.patch.object(gathering, "assert_ints_same_as_other_ranks", side_effect=compare) as compared,
    ):
        for budget in BUDGETS:
            plan = shard_batch(dataset, ROWS, world.rank, world.size, budget, COSTS)
            one_step(policy, objective, dataset, ROWS, budget, world)
            policy.train(False)
            evaluate(policy, objective, plan, world, RunningMeans())
            generate_together(policy, PROMPTS, Sampling(4), [60], 8192, world, of_base=adapter is not None)
            micro_batches.append(len(plan.micro_batches))
            comparisons.append(compared.call_count)
    return {"discarded": discarded.call_count, "compared": comparisons, "micro_batches": micro_batches}


def test_no_forward_discards_the_gather_order_of_another(assets: Assets, tmp_path: Path) -> None:
    for of_rank in run_ranks(partial(train, assets), 2, tmp_path / "ranks"):
        for name, case in of_rank.items():
            assert case["micro_batches"][0] > 2, name
            assert case["micro_batches"][1] == 1, name
            assert case["discarded"] == 0, name
            assert case["compared"][0] == case["compared"][-1], name
