"""Losses of routers are those of the global batch, for any number of ranks and micro-batches."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.config.losses import LossConfig, LossKind, RouterConfig
from dpo_dist.config.schema import Dtype, ModelConfig, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.processes.world import World
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import BatchFacts, preference_loss
from dpo_dist.objective.router import AUX_LOSS, BUSIEST, RouterLoss
from dpo_dist.training.steps.step import Objective, reduce_step
from tests.dist.scenario import Assets, RowsAtHand, load_policy, one_step, plain_training, reference_values
from tests.support import tiny
from tests.support.families import tiny_family
from tests.support.packing import plain_logps
from tests.support.padded import padded_inputs, rows_of
from tests.support.ranks import run_ranks

LOSS = LossConfig(beta=0.5, router=RouterConfig(0.5))
COUPLED = replace(LOSS, kind=LossKind.aot)
# Pairs and token budgets: one micro-batch on each rank, several, and fewer pairs than ranks.
STEPS: tuple[tuple[tuple[int, ...], int], ...] = (((0, 1, 2, 3, 4), 8192), ((5, 6, 7, 8, 9), 128), ((2,), 1))
ZERO3, ZERO2 = ParallelismConfig(), ParallelismConfig(ParallelismKind.zero2)
SHARED = ParallelismConfig(sequence_parallel=2)


def routed_steps(
    assets: Assets,
    model: Path,
    reference: Sequence[np.ndarray],
    loss: LossConfig,
    checkpointing: str,
    world: World,
    _folder: Path,
) -> dict[str, Any]:
    """Gradient norms and metrics of `STEPS`."""
    config = ModelConfig(str(model), dtype=Dtype.fp32, gradient_checkpointing=checkpointing)
    policy, dataset = load_policy(config, world), assets.dataset()
    objective = Objective(loss, RowsAtHand.of(dataset, reference), RouterLoss(0.5))
    found: dict[str, Any] = {"norms": [], "means": []}
    for rows, budget in STEPS:
        sums, norm = one_step(policy, objective, dataset, rows, budget, world)
        found["norms"].append(norm.item())
        found["means"].append(reduce_step(sums, [], norm, world).means)
    return found


def plain_steps(
    model: Any, dataset: PreferenceDataset, reference: Sequence[np.ndarray], loss: LossConfig
) -> dict[str, Any]:
    """The same by PyTorch and transformers alone: one padded batch of all responses for the routers."""
    means: list[dict[str, float]] = []

    def total(rows: Sequence[int]) -> Tensor:
        pairs = [dataset.example(row) for row in rows]
        values, lengths = reference_values(dataset, reference, rows)
        logps = sum_by_response(plain_logps(model, pairs), lengths)
        mean = preference_loss(logps, sum_by_response(values, lengths), loss, BatchFacts()).mean()
        ids, mask = padded_inputs([(prompt, response[:-1]) for prompt, response in rows_of(pairs)])
        outputs = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        kept = [of_layer[mask.flatten().bool()] for of_layer in outputs.router_logits]
        visits = [torch.bincount(of_layer.topk(2).indices.flatten()) / len(of_layer) for of_layer in kept]
        busiest = max(of_layer.max().item() for of_layer in visits)
        aux = outputs.aux_loss
        means.append({"loss": mean.item(), AUX_LOSS: aux.item(), BUSIEST: busiest})
        return mean + 0.5 * aux

    norms = plain_training(model, [partial(total, rows) for rows, _ in STEPS])
    return {"norms": norms, "means": means}


@pytest.mark.parametrize(
    ("model_type", "size", "kind", "loss", "checkpointing"),
    [
        pytest.param("qwen3_moe", 3, ZERO3, COUPLED, "full", id="3 ranks, zero3, coupled, checkpointing"),
        pytest.param("qwen3_next", 2, ZERO2, LOSS, "none", id="forked states, 2 ranks, zero2"),
        pytest.param("mixtral", 4, SHARED, LOSS, "full", id="mixtral, 2 times 2 ranks share tokens"),
    ],
)
def test_losses_of_routers_equal_those_of_the_whole_padded_batch(
    model_type: str,
    size: int,
    kind: ParallelismConfig,
    loss: LossConfig,
    checkpointing: str,
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    tiny_family(model_type, len(tiny.qwen())).save_pretrained(model)
    scenario = partial(routed_steps, assets, model, plain_entries, loss, checkpointing)
    results = run_ranks(scenario, size, tmp_path / "ranks", kind)
    # In float64, as the norm of float32 alone is off by up to 1.1e-5; grouped products do not take it.
    plain = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    expected = plain_steps(plain, assets.dataset(), plain_entries, loss)
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for means, wanted in zip(of_rank["means"], expected["means"], strict=True):
            assert {name: means[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
