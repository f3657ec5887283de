"""The step-0 gate: a model that is the reference must score like the reference's values do."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpo_dist.config.schema import Dtype, Numerics, RunConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.micro_batches import ComputeCosts
from dpo_dist.data.sampler import Indices
from dpo_dist.distributed.world import World
from dpo_dist.errors import ReferenceModelError
from dpo_dist.objective.losses import BatchFacts
from dpo_dist.reference.scoring import Scorer
from dpo_dist.training.batch_loss import Objective, ScoredPairs

# Mean absolute drift per token, in nats.
_TOLERANCE = {Dtype.fp32: 1e-4, Dtype.bf16: 5e-2}
_LOSS_TOLERANCE = {Dtype.fp32: 1e-3, Dtype.bf16: 5e-2}


@dataclass(frozen=True)
class _ScoredResponse:
    """How far the policy's value of one response lies from the reference's."""

    row: int
    which: int
    tokens: int
    token_drift: float
    largest_token_drift: float
    response_drift: float


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
    """Re-score a seeded sample of the `visited` rows with the training path and compare; collective.

    Args:
        score: the model that is the reference: the policy before its first update, or the reference itself.
        objective: the loss, and the reference's values that are put to the test.

    Returns:
        The drift, for the report: per token and per response, in nats.

    Raises:
        ReferenceModelError: log-probs drift beyond what the precision explains, or the loss is not its
            value at zero margin.
    """
    generator = np.random.default_rng([config.trainer.seed, 0xA0D17])
    count = min(config.reference.audit_pairs, len(visited))
    rows = np.sort(generator.choice(visited, size=count, replace=False))
    budget = config.trainer.micro_batch_tokens
    plan = shard_batch(dataset, rows, world.rank, world.size, budget, costs)
    scored: list[_ScoredResponse] = []
    losses = torch.zeros(2, dtype=torch.float64, device=world.device)
    with objective.prefetched(plan, world.device) as batches:
        for micro_rows, host_batch in zip(plan.micro_batches, batches, strict=True):
            batch = host_batch.to(world.device)
            stored = objective.reference.token_logps(batch)
            assert stored is not None, "the gate compares with a reference"
            fresh = score(batch)
            reference = objective.pair_logps(stored, batch)
            facts = BatchFacts(plan.mean_chosen_tokens, batch.score_gaps)
            for index, logps in enumerate((fresh, stored)):
                pairs = ScoredPairs(objective.pair_logps(logps, batch), reference, facts, batch.weights)
                losses[index] += objective.measure(pairs)[0].double()
            scored += _drifts(fresh - stored, host_batch.response_tokens, dataset, micro_rows)
    losses = world.sum(losses) / plan.pairs
    everywhere = [response for part in world.gather(scored) for response in part]
    report = _report(everywhere)
    _check_tokens(everywhere, dataset, config)
    loss, loss_at_zero_margin = losses.tolist()
    _check_loss_at_start(loss, loss_at_zero_margin, config.model.dtype)
    return report


def describe_drift(drift: dict[str, Any]) -> str:
    """Describe what `check_drift` reports in a sentence for the screen."""
    return (
        f"{drift['responses']:,} reference log-probs computed again: they differ by "
        f"{drift['mean_token_drift']:.2g} nats per token on average, by at most "
        f"{drift['largest_token_drift']:.2g} in a token and by at most "
        f"{drift['largest_response_drift']:.2g} in a response"
    )


def _drifts(
    difference: torch.Tensor, response_tokens: torch.Tensor, dataset: PreferenceDataset, rows: tuple[int, ...]
) -> list[_ScoredResponse]:
    if not rows:
        return []
    parts = torch.split(difference.cpu(), response_tokens.tolist())
    counts = dataset.response_counts(np.array(rows, dtype=np.int64)).tolist()
    owners = [(row, which) for row, count in zip(rows, counts, strict=True) for which in range(count)]
    return [
        _ScoredResponse(
            row=row,
            which=which,
            tokens=len(part),
            token_drift=float(part.abs().mean()),
            largest_token_drift=float(part.abs().max()),
            response_drift=abs(float(part.sum())),
        )
        for (row, which), part in zip(owners, parts, strict=True)
    ]


def _report(scored: list[_ScoredResponse]) -> dict[str, Any]:
    return {
        "responses": len(scored),
        "mean_token_drift": float(np.mean([s.token_drift for s in scored])),
        "largest_token_drift": max(s.largest_token_drift for s in scored),
        "largest_response_drift": max(s.response_drift for s in scored),
    }


def _tolerance(dtype: Dtype, tokens: int) -> float:
    """A bf16 forward's digits depend on the batch's shape: single tokens move, the mean of many hardly."""
    few = max(1.0, 8 / math.sqrt(tokens)) if dtype is Dtype.bf16 else 1.0
    return _TOLERANCE[dtype] * few


def _check_tokens(scored: list[_ScoredResponse], dataset: PreferenceDataset, config: RunConfig) -> None:
    dtype = config.model.dtype
    # Not "drift > tolerance", which lets nan pass.
    drifted = [s for s in scored if not s.token_drift <= _tolerance(dtype, s.tokens)]
    if drifted:
        named = [f"{dataset.origin(s.row)} response {s.which} ({s.token_drift:.2g})" for s in drifted[:5]]
        raise ReferenceModelError(
            f"{len(drifted)} of {len(scored)} sampled reference rows differ from a fresh computation",
            where="; ".join(named),
            got="mean drift per token as given above, in nats",
            expected=f"at most {_TOLERANCE[dtype]:g} with model.dtype={dtype}, more for a few tokens in bf16",
            remedy=(
                "the store does not belong to this model or was damaged: set another reference.store"
                if config.reference.numerics is Numerics.strict
                else "rows of other numerics are too far from this run's: set reference.numerics=strict"
            ),
        )


def _check_loss_at_start(loss: float, loss_at_zero_margin: float, dtype: Dtype) -> None:
    tolerance = _LOSS_TOLERANCE[dtype] * max(1.0, abs(loss_at_zero_margin))
    if not abs(loss - loss_at_zero_margin) <= tolerance:
        raise ReferenceModelError(
            "policy and reference are the same model, but the loss is not its value at zero margin",
            where="before the first step",
            got=f"{loss:.6f}",
            expected=f"{loss_at_zero_margin:.6f} within {tolerance:.2g}",
            remedy="policy and reference are computed differently; report this with the run folder's logs",
        )
