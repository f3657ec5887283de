"""Losses that couple the pairs of the global batch (`aot`, `beta_dpo`, ...): gradients in two passes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.collate import RankBatch
from dpo_dist.data.packing import copied_to
from dpo_dist.data.sampler import Indices
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import BatchFacts
from dpo_dist.objective.metrics import MetricSums, TokenSums
from dpo_dist.training.batch_loss import Objective, ReadyStep, ScoredPairs
from dpo_dist.training.finite_gradient import never_finite_if_not
from dpo_dist.training.router_terms import coupled_router_terms
from dpo_dist.training.step_timer import StepClock

_COLUMNS = 13


def accumulate_coupled(
    policy: PolicyEngine,
    objective: Objective,
    step: ReadyStep,
    facts: BatchFacts,
    world: World,
    clock: StepClock,
) -> MetricSums:
    """Accumulate the gradient of a coupled loss; return metric sums: those of the pairs on rank 0 only.

    1. Score all micro-batches without a graph, and all-reduce the log-probs of the global batch.
    2. On every rank, differentiate the loss of the global batch by each log-prob.
    3. Forward each micro-batch again, and backpropagate these derivatives.
    """
    rank_batch, scored = step.rank_batch, []
    policy.train(False)
    with torch.no_grad():
        for host_batch in step.batches:
            clock.enter("data")
            batch = host_batch.to(world.device)
            clock.enter("reference")
            reference = objective.reference.token_logps(batch)
            clock.enter("forward")
            scored.append(objective.score(policy, batch, reference, facts))
    pairs = gather_pairs(scored, rank_batch, world)
    leaves = [leaf.requires_grad_() for leaf in _differentiable(pairs.policy)]
    loss, sums = objective.measure(pairs)
    slopes = torch.autograd.grad(
        never_finite_if_not(loss, pairs.policy.chosen) / rank_batch.pairs,
        leaves,
        allow_unused=True,
        materialize_grads=True,
    )

    if not world.is_main:
        sums = objective.no_sums(rank_batch, world.device)
    routers = coupled_router_terms(objective.router, scored, step, world)
    policy.train()
    for number, (host_batch, positions) in enumerate(
        zip(step.batches, rank_batch.positions, strict=True), start=1
    ):
        clock.enter("data")
        batch = host_batch.to(world.device)
        clock.enter("forward")
        token_logps, routing = objective.forward(policy, batch)
        logps = objective.pair_logps(token_logps, batch)
        clock.enter("backward")
        own = _on_device(positions or (0,), world.device)
        parts = zip(slopes, _differentiable(logps), strict=True)
        surrogate = (torch.stack([slope[own] * part for slope, part in parts]) * batch.weights).sum()
        if routers is not None and routing is not None:
            surrogate, sums = routers.add(surrogate, routing, sums)
        policy.backward(surrogate, is_last=number == len(step.batches))
    return sums


def coupled_sums(
    objective: Objective, scored: Sequence[ScoredPairs], rank_batch: RankBatch, world: World
) -> MetricSums:
    """Return the metric sums of a coupled loss, which are zero on all ranks but 0; collective."""
    _, sums = objective.measure(gather_pairs(scored, rank_batch, world))
    return sums if world.is_main else objective.no_sums(rank_batch, world.device, is_evaluation=True)


def gather_pairs(scored: Sequence[ScoredPairs], rank_batch: RankBatch, world: World) -> ScoredPairs:
    """Return all pairs of the global batch in its order, the same on every rank; collective.

    Args:
        scored: this rank's micro-batches, without a graph.
    """
    whole = torch.zeros(_COLUMNS, rank_batch.pairs, dtype=torch.float64, device=world.device)
    for pairs, positions in zip(scored, rank_batch.positions, strict=True):
        if positions:
            whole[:, _on_device(positions, world.device)] = _columns(pairs)
    chosen, rejected, chosen_tokens, rejected_tokens, whole_chosen, *others = world.sum_replicas(whole)
    reference_chosen, reference_rejected, score_gaps, pair_weights, *others = others
    kl_chosen, kl_rejected, entropy_chosen, entropy_rejected = others
    policy, reference, facts = scored[0].policy, scored[0].reference, scored[0].facts
    measured = scored[0].tokens
    tokens = chosen_tokens, rejected_tokens
    return ScoredPairs(
        policy=PairLogps(
            chosen, rejected, *tokens, whole_chosen=None if policy.whole_chosen is None else whole_chosen
        ),
        reference=None if reference is None else PairLogps(reference_chosen, reference_rejected, *tokens),
        facts=replace(
            facts,
            score_gaps=score_gaps,
            pair_weights=None if facts.pair_weights is None else pair_weights,
        ),
        weights=torch.ones_like(chosen),
        tokens=TokenSums(
            None if measured.kl is None else PairLogps(kl_chosen, kl_rejected, *tokens),
            None if measured.entropy is None else PairLogps(entropy_chosen, entropy_rejected, *tokens),
        ),
        labels=rank_batch.dataset.labels,
        sources=None if rank_batch.sources is None else _on_device(rank_batch.sources, world.device),
        is_evaluation=scored[0].is_evaluation,
    )


def _columns(pairs: ScoredPairs) -> Tensor:
    """Return float64 [13, pairs]: the inputs of a coupled loss and its metrics, zeros for missing ones."""
    policy, reference, facts = pairs.policy, pairs.reference, pairs.facts
    kl, entropy = pairs.tokens.kl, pairs.tokens.entropy
    columns = (
        policy.chosen,
        policy.rejected,
        policy.chosen_tokens,
        policy.rejected_tokens,
        policy.whole_chosen,
        None if reference is None else reference.chosen,
        None if reference is None else reference.rejected,
        facts.score_gaps,
        facts.pair_weights,
        *((None, None) if kl is None else (kl.chosen, kl.rejected)),
        *((None, None) if entropy is None else (entropy.chosen, entropy.rejected)),
    )
    zeros = torch.zeros_like(policy.chosen)
    return torch.stack([zeros if column is None else column for column in columns])


def _differentiable(logps: PairLogps) -> list[Tensor]:
    """Return the sums that a coupled loss is differentiated by, [pairs] each."""
    whole = () if logps.whole_chosen is None else (logps.whole_chosen,)
    return [logps.chosen, logps.rejected, *whole]


def _on_device(numbers: Sequence[int] | Indices, device: torch.device) -> Tensor:
    """Return `numbers` as int64 [n] on `device`, without waiting for it."""
    return copied_to(device, np.asarray(numbers, dtype=np.int64))
