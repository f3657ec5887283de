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

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nan, where

from dpo_dist.batching.pack import copied_to
from dpo_dist.batching.sampler import Indices
from dpo_dist.data.collate import RankBatch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.insight.metrics.log import PHASES, Phase
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import BatchFacts, RunningMeans
from dpo_dist.objective.metrics import MetricSums, PairValues, TokenSums, metric_means, pair_values
from dpo_dist.training.loss import (
    Objective,
    ReadyStep,
    ScoredModel,
    ScoredPairs,
    coupled_router_terms,
    router_terms,
)


def never_finite_if_not(loss: Tensor, logps: Tensor) -> Tensor:
    """Return `loss`, whose gradient is not finite if the loss is not, so that no rank applies the update.

    Args:
        loss: of a micro-batch; a pair whose loss is infinite may have no gradient of its own.
        logps: of its responses, through which the gradient flows; [n].
    """
    return loss + where(loss.detach().isfinite(), 0.0, nan) * logps.sum()


class StepClock:
    """Seconds of one step by phase, from construction on.

    On CUDA, where the host only queues work, phases are timed between events in the device's stream; time
    that the device waits for the host is included. Elsewhere they are timed by the host's clock.
    """

    def __init__(self, device: torch.device):
        self._started = time.monotonic()
        self._on_cuda = device.type == "cuda"
        self._phases: list[Phase] = []
        self._seconds: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def enter(self, phase: Phase) -> None:
        """Start `phase`, which lasts until the next call; never waits for the device."""
        self._phases.append(phase)
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(time.monotonic())

    def stop(self) -> dict[Phase, float]:
        """Return the seconds of every phase; `other` is the rest, so that they add up to those of the step.

        Call it after the host has waited for the device, which the all-reduce of metrics makes it do.
        """
        total = time.monotonic() - self._started
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, duration in zip(self._phases, self._durations(), strict=False):
            seconds[phase] += duration
        seconds["other"] = 0.0
        seconds["other"] = total - sum(seconds.values())
        return seconds

    def _durations(self) -> list[float]:
        """Return the seconds from each `enter` to the next."""
        if self._on_cuda:
            if self._events:
                # The device may not have reached the last event yet: its phase began after the host waited.
                self._events[-1].synchronize()
            return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(self._events)]
        return [end - begin for begin, end in itertools.pairwise(self._seconds)]


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
        for _, pairs in objective.scored(policy, step.batches, facts, world.device, clock.enter):
            scored.append(pairs)
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
    scored = objective.scored(policy, step.batches, facts, world.device, clock.enter)
    for number, (_, pairs) in enumerate(scored, start=1):
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

    def enter(phase: Phase) -> None:
        if phase == "data":
            give_way()

    with objective.prefetched(rank_batch, world.device) as batches:
        scoring = objective.scored(model, batches, facts, world.device, enter, is_evaluation=True)
        for _, pairs in scoring:
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
