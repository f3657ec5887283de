"""Losses of routers are those of the global batch, for any number of ranks and micro-batches."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.config.losses import LossConfig, LossKind, RouterConfig
from dpo_dist.config.schema import Dtype, ModelConfig, ParallelismConfig, ParallelismKind
from dpo_dist.data.collate import shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import BatchFacts, RunningMeans, preference_loss
from dpo_dist.objective.router import AUX_LOSS, BUSIEST, Z_LOSS, RouterLoss
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, reduce_step, train_step
from tests.dist.scenario import Assets
from tests.dist.test_engine import RowsAtHand
from tests.dist.test_moe import write_moe
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import OPTIM, run_ranks

ROUTER = RouterConfig(0.5, 0.01)
LOSS = LossConfig(beta=0.5, router=ROUTER)
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
    config, dataset = (
        ModelConfig(str(model), dtype=Dtype.fp32, gradient_checkpointing=checkpointing),
        assets.dataset(),
    )
    policy = PolicyEngine(
        load_packed(model, config, 1024, world.device, sequence=world.sequence), OPTIM, world
    )
    router = RouterLoss(loss.router.aux_coefficient, loss.router.z_coefficient)
    objective = Objective(loss, RowsAtHand.of(dataset, reference), router if loss.router.is_set else None)
    found: dict[str, Any] = {"norms": [], "means": []}
    for rows, budget in STEPS:
        plan = shard_batch(dataset, np.array(rows), world.replica, world.replicas, budget, COSTS)
        ready = objective.ready_step(plan, world.device)
        clock = StepClock(world.device)
        sums, norm = train_step(policy, objective, ready, OPTIM.lr, world, clock, RunningMeans())
        found["norms"].append(norm.item())
        found["means"].append(reduce_step(sums, [], norm, world).means)
    return found


def plain_steps(
    model: Any, dataset: PreferenceDataset, reference: Sequence[np.ndarray], loss: LossConfig
) -> dict[str, Any]:
    """The same by PyTorch and transformers alone: one padded batch of all responses for the routers."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, eps=OPTIM.eps)
    found: dict[str, Any] = {"norms": [], "means": []}
    for rows, _ in STEPS:
        pairs = [dataset.sequences(row) for row in rows]
        lengths = torch.tensor([len(response) for pair in pairs for response in pair.responses])
        values = np.concatenate([reference[place] for row in rows for place in dataset.response_range(row)])
        logps = sum_by_response(plain_logps(model, pairs), lengths)
        theirs = sum_by_response(torch.from_numpy(values), lengths)
        losses = preference_loss(logps, theirs, loss, BatchFacts())
        inputs = [np.concatenate((pair.prompt_ids, r[:-1])) for pair in pairs for r in pair.responses]
        ids = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(inputs):
            ids[place, : len(row)], mask[place, : len(row)] = torch.from_numpy(row.astype(np.int64)), 1
        outputs = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        kept = [of_layer[mask.flatten().bool()] for of_layer in outputs.router_logits]
        z_loss = torch.cat(kept).logsumexp(-1).square().mean()
        busiest = max(
            torch.bincount(of_layer.topk(2).indices.flatten()).max().item() / len(of_layer)
            for of_layer in kept
        )
        total = losses.mean() + ROUTER.aux_coefficient * outputs.aux_loss + ROUTER.z_coefficient * z_loss
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        found["norms"].append(norm)
        found["means"].append(
            {
                "loss": losses.mean().item(),
                AUX_LOSS: outputs.aux_loss.item(),
                Z_LOSS: z_loss.item(),
                BUSIEST: busiest,
            }
        )
    return found


@pytest.mark.parametrize(
    ("model_type", "size", "kind", "loss", "checkpointing"),
    [
        pytest.param("qwen3_moe", 1, ZERO3, LOSS, "none", id="qwen3_moe, 1 rank, zero3"),
        pytest.param("mixtral", 2, ZERO3, LOSS, "full", id="mixtral, 2 ranks, zero3, checkpointing"),
        pytest.param("qwen3_moe", 3, ZERO3, LOSS, "none", id="qwen3_moe, 3 ranks, zero3"),
        pytest.param("mixtral", 2, ZERO2, LOSS, "none", id="mixtral, 2 ranks, zero2"),
        pytest.param("qwen3_moe", 2, ZERO3, COUPLED, "none", id="qwen3_moe, 2 ranks, coupled loss"),
        pytest.param("mixtral", 2, SHARED, LOSS, "full", id="mixtral, 2 ranks share tokens, checkpointing"),
        pytest.param("qwen3_moe", 4, SHARED, LOSS, "none", id="qwen3_moe, 2 times 2 ranks share tokens"),
        pytest.param("qwen3_moe", 2, SHARED, COUPLED, "none", id="qwen3_moe, 2 share tokens, coupled loss"),
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
    model = write_moe(tmp_path / "model", model_type)
    scenario = partial(routed_steps, assets, model, plain_entries, loss, checkpointing)
    results = run_ranks(scenario, size, tmp_path / "ranks", kind)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = plain_steps(plain, assets.dataset(), plain_entries, loss)
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        for means, wanted in zip(of_rank["means"], expected["means"], strict=True):
            assert {name: means[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
