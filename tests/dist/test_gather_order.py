"""Under ZeRO-3 every kind of forward keeps its recorded gather order."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
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
from tests.support.sft_adapter import write_sft_adapter

# The token budgets of steps and what follows them: many micro-batches, one, many.
BUDGETS = (64, 8192, 64)
ROWS = np.arange(6)
PROMPTS = [Request(np.array([100, 101], np.int32), "key", 0)]


CASES = {
    f"{kind}, {'adapter' if adapter else 'whole'}": (LossConfig(kind, reference_free=not adapter), adapter)
    for kind in (LossKind.sigmoid, LossKind.aot)
    for adapter in (AdapterConfig(r=2), None)
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


def switch(assets: Assets, sft: Path, world: World, _folder: Path) -> float:
    """Return the largest difference of log-probs of the policy and of its start, before training."""
    adapter = AdapterConfig(path=str(sft))
    policy = load_policy(ModelConfig(str(assets.policy), Dtype.fp32, adapter=adapter), world, start=sft)
    policy.train(False)
    plan = shard_batch(assets.dataset(), ROWS, world.rank, world.size, 8192, COSTS)
    objective = Objective(LossConfig(reference_free=True), ReferenceProvider())
    differences = [0.0]
    with objective.prefetched(plan, world.device) as batches, torch.no_grad():
        batch = next(iter(batches)).to(world.device)
        for _ in range(3):  # the first two record the order of the policy, as the check at start does
            policy.token_logps(batch)
        for _ in range(3):
            differences.append(
                (policy.base_token_logps(batch) - policy.token_logps(batch)).abs().max().item()
            )
    return max(differences)


def test_a_start_adapter_keeps_the_order_that_was_recorded_without_it(assets: Assets, tmp_path: Path) -> None:
    sft = write_sft_adapter(assets.policy, tmp_path / "sft")
    assert max(run_ranks(partial(switch, assets, sft), 2, tmp_path / "ranks")) < 1e-6
