"""Step-0 check: re-score a sample and compare with the reference log-probs that training will use."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_dist.config.schema import Dtype, Numerics, RunConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.micro_batches import ComputeCosts
from dpo_dist.data.sampler import Indices
from dpo_dist.distributed.world import World
from dpo_dist.errors import ReferenceModelError
from dpo_dist.number_text import counted
from dpo_dist.objective.losses import BatchFacts
from dpo_dist.reference.scoring import Scorer
from dpo_dist.training.batch_loss import Objective, ScoredPairs

# Mean absolute drift per token in nats.
_TOLERANCE = {Dtype.fp32: 1e-4, Dtype.fp16: 2e-2, Dtype.bf16: 5e-2}
_LOSS_TOLERANCE = {Dtype.fp32: 1e-3, Dtype.fp16: 2e-2, Dtype.bf16: 5e-2}


@dataclass(frozen=True)
class _Drift:
    """Difference between the fresh and the stored log-probs of one response, in nats.

    Attributes:
        index: of the example in its dataset.
        response: number of the response in the example.
        tokens: of the response.
        mean: over tokens, absolute.
        largest: of a token, absolute.
        total: of the sum over tokens, absolute.
    """

    index: int
    response: int
    tokens: int
    mean: float
    largest: float
    total: float


@torch.no_grad()
def check_drift(
    score: Scorer,
    objective: Objective,
    dataset: PreferenceDataset,
    visited: Indices,
    costs: ComputeCosts,
    config: RunConfig,
    world: World,
) -> dict[str, Any]:
    """Re-score a seeded sample of the `visited` indices with the training path and compare; collective.

    Args:
        score: the reference model, or the policy before its first update if it starts as this model.
        objective: the loss, and the reference log-probs to check.
        visited: dataset indices to draw the sample from.

    Returns:
        The drift per token and per response, in nats, for the report.

    Raises:
        ReferenceModelError: log-probs differ by more than the precision explains, or the loss differs from
            its value at zero margin.
    """
    generator = np.random.default_rng([config.trainer.seed, 0xA0D17])
    count = min(config.reference.audit_pairs, len(visited))
    indices = np.sort(generator.choice(visited, size=count, replace=False))
    budget = config.trainer.micro_batch_tokens
    rank_batch = shard_batch(dataset, indices, world.replica, world.replicas, budget, costs)
    drifts: list[_Drift] = []
    losses = torch.zeros(2, dtype=torch.float64, device=world.device)
    with objective.prefetched(rank_batch, world.device) as batches:
        for micro_batch, host_batch in zip(rank_batch.micro_batches, batches, strict=True):
            batch = host_batch.to(world.device)
            stored = objective.reference.token_logps(batch)
            assert stored is not None, "the step-0 check needs a reference"
            fresh = score(batch)
            reference = objective.pair_logps(stored, batch)
            facts = BatchFacts(rank_batch.mean_chosen_tokens, batch.score_gaps)
            for index, logps in enumerate((fresh, stored)):
                pairs = ScoredPairs(objective.pair_logps(logps, batch), reference, facts, batch.weights)
                losses[index] += objective.measure(pairs)[0].double()
            drifts += _drifts(fresh - stored, host_batch.response_tokens, dataset, micro_batch)
    losses = world.sum_replicas(losses) / rank_batch.pairs
    drifts = [drift for part in world.gather(drifts if world.leads else []) for drift in part]
    _check_tolerance(drifts, dataset, config)
    loss, loss_at_zero_margin = losses.tolist()
    _check_loss_at_start(loss, loss_at_zero_margin, config.model.dtype)
    return {
        "responses": len(drifts),
        "mean_token_drift": float(np.mean([drift.mean for drift in drifts])),
        "largest_token_drift": max(drift.largest for drift in drifts),
        "largest_response_drift": max(drift.total for drift in drifts),
    }


def describe_drift(drift: dict[str, Any]) -> str:
    """Return the report of `check_drift` as the end of a sentence: "the log-probs are ..."."""
    responses = counted(drift["responses"], "response")
    if not drift["largest_token_drift"]:
        return f"equal on a sample of {responses}"
    return (
        f"equal within rounding on a sample of {responses}: by {drift['largest_token_drift']:.2g} nats in a "
        f"token, {drift['largest_response_drift']:.2g} in a response"
    )


def _drifts(
    difference: Tensor, response_tokens: Tensor, dataset: PreferenceDataset, indices: tuple[int, ...]
) -> list[_Drift]:
    """Return the drift of every response of a micro-batch; none for a dummy.

    Args:
        difference: float32 [targets], fresh log-probs minus stored ones.
        response_tokens: int64 [responses].
        indices: of the micro-batch's examples in `dataset`.
    """
    if not indices:
        return []
    parts = torch.split(difference.cpu(), response_tokens.tolist())
    counts = dataset.response_counts(np.array(indices, dtype=np.int64)).tolist()
    owners = [(i, response) for i, count in zip(indices, counts, strict=True) for response in range(count)]
    return [
        _Drift(
            index=index,
            response=response,
            tokens=len(part),
            mean=float(part.abs().mean()),
            largest=float(part.abs().max()),
            total=abs(float(part.sum())),
        )
        for (index, response), part in zip(owners, parts, strict=True)
    ]


def _tolerance(dtype: Dtype, tokens: int) -> float:
    """Return the allowed mean drift of a response.

    A forward in 16 bits depends on the shape of its batch: single tokens move, the mean of many hardly does.
    """
    factor = max(1.0, 8 / math.sqrt(tokens)) if dtype is not Dtype.fp32 else 1.0
    return _TOLERANCE[dtype] * factor


def _check_tolerance(drifts: list[_Drift], dataset: PreferenceDataset, config: RunConfig) -> None:
    dtype = config.model.dtype
    # Not "mean > tolerance", which accepts nan.
    failed = [drift for drift in drifts if not drift.mean <= _tolerance(dtype, drift.tokens)]
    if not failed:
        return
    listed = [f"{dataset.origin(d.index)} response {d.response} ({d.mean:.2g})" for d in failed[:5]]
    raise ReferenceModelError(
        f"{len(failed)} of {len(drifts)} sampled reference log-probs differ from a fresh computation",
        where="; ".join(listed),
        got="the mean difference per token in parentheses, in nats",
        expected=f"at most {_TOLERANCE[dtype]:g} with model.dtype={dtype}, more for short responses in "
        "16 bits",
        remedy=(
            "the store belongs to another model or is damaged: set another reference.store"
            if config.reference.numerics is Numerics.strict
            else "log-probs of other numerics differ too much: set reference.numerics=strict"
        ),
    )


def _check_loss_at_start(loss: float, loss_at_zero_margin: float, dtype: Dtype) -> None:
    tolerance = _LOSS_TOLERANCE[dtype] * max(1.0, abs(loss_at_zero_margin))
    if not abs(loss - loss_at_zero_margin) <= tolerance:
        raise ReferenceModelError(
            "policy and reference are the same model, but the loss differs from its value at zero margin",
            where="before the first step",
            got=f"{loss:.6f}",
            expected=f"{loss_at_zero_margin:.6f} within {tolerance:.2g}",
            remedy="a bug: policy and reference are computed differently; report it with the logs of the run",
        )
