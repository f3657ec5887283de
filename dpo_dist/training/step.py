"""One optimizer step, and one evaluation.

packed micro-batches of this rank (from disk to the host, by `Objective.ready_step`)
  -> reference log-probs     stored and attached already, or one forward of the reference
  -> policy log-probs        one forward
  -> loss, metric sums       objective/losses.py, objective/metrics.py; of experts' routers: router_terms.py
  -> backward                gradients of loss / pairs of the global batch add up
after the last micro-batch
  -> clip and update         skipped on all ranks if the gradient is not finite on any
  -> metrics                 one all-reduce of sums and counts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.collate import RankBatch
from dpo_dist.data.packing import copied_to
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.objective.losses import BatchFacts
from dpo_dist.objective.metrics import MetricSums, metric_means
from dpo_dist.objective.pair_values import PairValues, pair_values
from dpo_dist.objective.running_stats import RunningMeans
from dpo_dist.training.batch_loss import Objective, ReadyStep, ScoredModel
from dpo_dist.training.coupled import accumulate_coupled, coupled_sums
from dpo_dist.training.finite_gradient import never_finite_if_not
from dpo_dist.training.router_terms import router_terms
from dpo_dist.training.step_timer import StepClock


def train_step(
    policy: PolicyEngine,
    objective: Objective,
    step: ReadyStep,
    rate: float,
    world: World,
    clock: StepClock,
    running: RunningMeans,
) -> tuple[MetricSums, Tensor]:
    """Update the policy on one global batch; collective.

    Args:
        running: means over the steps before, which some losses use.

    Returns:
        This rank's metric sums, and the gradient norm before clipping: a scalar on the device, the same on
        all ranks, infinite if the update was skipped.
    """
    facts = BatchFacts(step.rank_batch.mean_chosen_tokens, running=running)
    accumulate = accumulate_coupled if objective.loss.is_coupled else _accumulate
    sums = accumulate(policy, objective, step, facts, world, clock)
    clock.enter("optimizer")
    grad_norm = policy.step(rate)
    clock.enter("other")
    return sums, grad_norm


def _accumulate(
    policy: PolicyEngine,
    objective: Objective,
    step: ReadyStep,
    facts: BatchFacts,
    world: World,
    clock: StepClock,
) -> MetricSums:
    """Accumulate the gradient of a loss that is a sum over pairs; return this rank's metric sums."""
    pairs_in_batch = step.rank_batch.pairs  # over all ranks
    sums = objective.no_sums(step.rank_batch, world.device)
    clock.enter("forward")
    routers = router_terms(policy, objective.router, step, world)
    policy.train()
    for number, host_batch in enumerate(step.batches, start=1):
        clock.enter("data")
        batch = host_batch.to(world.device)
        clock.enter("reference")
        reference = objective.reference.token_logps(batch)
        clock.enter("forward")
        pairs = objective.score(policy, batch, reference, facts)
        loss, batch_sums = objective.measure(pairs)
        loss, sums = never_finite_if_not(loss, pairs.policy.chosen) / pairs_in_batch, sums + batch_sums
        if routers is not None and pairs.routing is not None:
            loss, sums = routers.add(loss, pairs.routing, sums)
        clock.enter("backward")
        policy.backward(loss, is_last=number == len(step.batches))
    return sums


@dataclass(frozen=True)
class StepTotals:
    """The metrics of one step over its global batch, on the host and the same on all ranks.

    Attributes:
        sums: by metric.
        counts: by metric.
        means: by metric.
        votes: the number of ranks with each vote.
        grad_norm: before clipping.
    """

    sums: dict[str, float]
    counts: dict[str, float]
    means: dict[str, float]
    votes: list[int]
    grad_norm: float


def reduce_step(sums: MetricSums, votes: Sequence[bool], grad_norm: Tensor, world: World) -> StepTotals:
    """Sum metrics and votes over all ranks: one all-reduce, one device-to-host copy; collective."""
    cast = copied_to(sums.values.device, np.array(votes, dtype=np.float64))
    own = sums.values if world.leads else torch.zeros_like(sums.values)
    total = world.sum(torch.cat((own, cast)))
    *reduced, norm = torch.cat((total, grad_norm.double().view(1))).tolist()
    by_metric, counts = sums.named(reduced)
    counted = [round(vote) for vote in reduced[len(sums.values) :]]
    return StepTotals(by_metric, counts, metric_means(by_metric, counts), counted, norm)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        sums: this rank's metric sums.
        values: of every pair, on rank 0; None on the other ranks.
    """

    sums: MetricSums
    values: PairValues | None


@torch.no_grad()
def evaluate(
    model: ScoredModel | None,
    objective: Objective,
    rank_batch: RankBatch,
    world: World,
    running: RunningMeans,
    give_way: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return metrics and pair values of a dataset, which is one global batch; collective.

    Args:
        model: not in training mode; None: the reference, without a forward of another model.
        give_way: called before each micro-batch, of which all ranks have the same number; may raise.
    """
    facts = BatchFacts(rank_batch.mean_chosen_tokens, running=running)
    sums, scored = objective.no_sums(rank_batch, world.device, is_evaluation=True), []
    values: list[Tensor] = []
    with objective.prefetched(rank_batch, world.device) as batches:
        for host_batch in batches:
            give_way()
            batch = host_batch.to(world.device)
            reference = objective.reference.token_logps(batch)
            pairs = objective.score(model, batch, reference, facts, is_evaluation=True)
            values.append(pair_values(pairs.policy, pairs.reference, objective.loss))
            if objective.loss.is_coupled:
                scored.append(pairs)
            else:
                sums += objective.measure(pairs)[1]
    if objective.loss.is_coupled:
        sums = coupled_sums(objective, scored, rank_batch, world)
    return Evaluation(sums, _gather_values(values, rank_batch, world))


def _gather_values(values: Sequence[Tensor], rank_batch: RankBatch, world: World) -> PairValues | None:
    """Return the values of all pairs on rank 0, None on the others; collective.

    Args:
        values: `pair_values` of this rank's micro-batches.
    """
    own = [
        (positions, of_batch)
        for positions, of_batch in zip(rank_batch.positions, values, strict=True)
        if positions and world.leads  # not a dummy, and once for each replica
    ]
    positions = np.array([position for of_batch, _ in own for position in of_batch], dtype=np.int64)
    columns = np.empty((0, 0), dtype=np.float32)
    if own:
        columns = torch.cat([of_batch for _, of_batch in own], dim=1).cpu().numpy()
    parts = world.to_main((positions, columns))
    if parts is None:
        return None
    return PairValues.joined((part for part in parts if len(part[0])), rank_batch.pairs)
