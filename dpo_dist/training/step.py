"""One optimizer step and one evaluation, as sums over this rank's micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dpo_dist.config.loss_kinds import LossConfig, Weighting
from dpo_dist.data.collate import RankBatch
from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.objective.logps import PairLogps, desensitised_weights, sum_by_response, wpo_weights
from dpo_dist.objective.losses import preference_loss
from dpo_dist.objective.metrics import MetricSums, metric_names, metric_sums
from dpo_dist.objective.running_stats import RunningMeans
from dpo_dist.prefetch import prefetch
from dpo_dist.reference.providers import ReferenceProvider
from dpo_dist.training.coupled import ScoredPairs, gather_pairs, index_of
from dpo_dist.training.step_timer import StepClock

BATCHES_AHEAD = 4


@dataclass(frozen=True)
class ReadyStep:
    """One global batch as this rank trains on it, with all its micro-batches on the host."""

    plan: RankBatch
    batches: Sequence[PackedBatch]


@dataclass(frozen=True)
class Objective:
    """What a micro-batch is measured by: the loss and where its reference values come from."""

    loss: LossConfig
    reference: ReferenceProvider

    def ready_batches(self, plan: RankBatch, device: torch.device) -> Iterator[PackedBatch]:
        """This rank's micro-batches in order, on the host, with all that can be done before they are needed:
        packed, stored reference values looked up, and in memory that a copy to `device` need not wait for.
        """
        for batch in plan.batches():
            ready = self.reference.attach(batch)
            if self.loss.ld_alpha is not None:
                weights = desensitised_weights(batch.pair_tokens, self.loss.ld_alpha)
                ready = replace(ready, token_weights=weights)
            yield ready.pinned() if device.type == "cuda" else ready

    def ready_step(self, plan: RankBatch, device: torch.device) -> ReadyStep:
        """All `ready_batches` of a training step."""
        return ReadyStep(plan, list(self.ready_batches(plan, device)))

    def pairs(self, token_logps: Tensor, batch: PackedBatch) -> PairLogps:
        """Per-token log-probs of a batch added up as the loss wants them."""
        return sum_by_response(token_logps, batch.response_tokens, batch.ranking, batch.token_weights)

    def reference_logps(self, batch: PackedBatch) -> PairLogps | None:
        """The reference's log-probs of the batch's pairs, without a graph."""
        token_logps = self.reference.token_logps(batch)
        return None if token_logps is None else self.pairs(token_logps, batch)

    def score(self, policy: PolicyEngine, batch: PackedBatch, reference: PairLogps | None) -> ScoredPairs:
        """One forward of the policy; collective."""
        pair_weights = None
        if self.loss.weighting is Weighting.wpo:
            token_logps, collisions = policy.token_logps(batch, with_collisions=True)
            plain_sums = partial(
                sum_by_response, response_tokens=batch.response_tokens, ranking=batch.ranking
            )
            pair_weights = wpo_weights(token_logps, collisions, plain_sums)
        else:
            token_logps = policy.token_logps(batch)
        logps = self.pairs(token_logps, batch)
        return ScoredPairs(logps, reference, batch.score_gaps, pair_weights, batch.weights)

    def measure(
        self, pairs: ScoredPairs, mean_chosen_tokens: float, running: RunningMeans
    ) -> tuple[Tensor, MetricSums]:
        """Sum of the losses, with a graph where gradients are on, and the metric sums.

        Args:
            pairs: of a micro-batch; for a coupled loss all of the global batch.
            mean_chosen_tokens: of the global batch.
            running: of the steps before.
        """
        losses = preference_loss(
            pairs.policy, pairs.reference, self.loss, pairs.facts(mean_chosen_tokens, running)
        )
        sums = metric_sums(losses, pairs.policy, pairs.reference, self.loss, pairs.counts)
        return (losses * pairs.counts).sum(), sums


def train_step(
    policy: PolicyEngine,
    objective: Objective,
    step: ReadyStep,
    rate: float,
    world: World,
    clock: StepClock,
    running: RunningMeans,
) -> tuple[MetricSums, Tensor]:
    """Forward, backward and update over one global batch; collective.

    Args:
        running: of the steps before.

    Returns:
        This rank's metric sums, and the gradient norm, a scalar on the device, infinite where no weight was
        changed because it was not finite (the same on all ranks).
    """
    accumulate = _accumulate_coupled if objective.loss.is_coupled else _accumulate
    sums = accumulate(policy, objective, step, world, clock, running)
    clock.enter("optimizer")
    grad_norm = policy.step(rate)
    clock.enter("other")
    return sums, grad_norm


def _score(
    policy: PolicyEngine, objective: Objective, host_batch: PackedBatch, world: World, clock: StepClock
) -> ScoredPairs:
    """One micro-batch by reference and policy; collective."""
    clock.enter("data")
    batch = host_batch.to(world.device)
    clock.enter("reference")
    reference = objective.reference_logps(batch)
    clock.enter("forward")
    return objective.score(policy, batch, reference)


def _accumulate(
    policy: PolicyEngine,
    objective: Objective,
    step: ReadyStep,
    world: World,
    clock: StepClock,
    running: RunningMeans,
) -> MetricSums:
    """Gradients of a loss that is a sum over pairs: micro-batch by micro-batch."""
    policy.train()
    sums = MetricSums.zeros(metric_names(objective.loss), world.device)
    for number, host_batch in enumerate(step.batches, start=1):
        pairs = _score(policy, objective, host_batch, world, clock)
        loss, batch_sums = objective.measure(pairs, step.plan.mean_chosen_tokens, running)
        sums += batch_sums
        clock.enter("backward")
        policy.backward(loss / step.plan.pairs, is_last=number == len(step.batches))
    return sums


def _accumulate_coupled(
    policy: PolicyEngine,
    objective: Objective,
    step: ReadyStep,
    world: World,
    clock: StepClock,
    running: RunningMeans,
) -> MetricSums:
    """Gradients of a loss that couples the pairs of the global batch, in two passes.

    All pairs are scored without a graph and gathered; on every rank the same loss of all of them gives its
    derivative by each log-prob; a second forward goes backward from these.
    """
    plan, batches = step.plan, step.batches
    with torch.no_grad():
        policy.train(False)
        scored = [_score(policy, objective, batch, world, clock) for batch in batches]
    pairs = gather_pairs(scored, plan, world)
    leaves = [leaf.requires_grad_() for leaf in _summed(pairs.policy)]
    loss, sums = objective.measure(pairs, plan.mean_chosen_tokens, running)
    slopes = torch.autograd.grad(loss / plan.pairs, leaves, allow_unused=True, materialize_grads=True)
    policy.train()
    for number, (host_batch, places) in enumerate(zip(batches, plan.positions, strict=True), start=1):
        clock.enter("data")
        batch = host_batch.to(world.device)
        clock.enter("forward")
        logps = objective.pairs(policy.token_logps(batch), batch)
        clock.enter("backward")
        own = index_of(places or (0,), world.device)
        parts = zip(slopes, _summed(logps), strict=True)
        surrogate = torch.stack([slope[own] * part for slope, part in parts]) * batch.weights
        policy.backward(surrogate.sum(), is_last=number == len(batches))
    return sums if world.is_main else MetricSums.zeros(sums.names, world.device)


def _summed(logps: PairLogps) -> list[Tensor]:
    """The sums that a coupled loss depends on, [pairs] each."""
    whole = () if logps.whole_chosen is None else (logps.whole_chosen,)
    return [logps.chosen, logps.rejected, *whole]


@torch.no_grad()
def evaluate(
    policy: PolicyEngine, objective: Objective, plan: RankBatch, world: World, running: RunningMeans
) -> MetricSums:
    """This rank's metric sums over the pairs of `plan`, a single batch for coupled losses; collective."""
    policy.train(False)
    names = metric_names(objective.loss)
    sums = MetricSums.zeros(names, world.device)
    scored = []
    with prefetch(objective.ready_batches(plan, world.device), BATCHES_AHEAD) as batches:
        for host_batch in batches:
            batch = host_batch.to(world.device)
            pairs = objective.score(policy, batch, objective.reference_logps(batch))
            if objective.loss.is_coupled:
                scored.append(pairs)
            else:
                sums += objective.measure(pairs, plan.mean_chosen_tokens, running)[1]
    if objective.loss.is_coupled:
        _, of_all = objective.measure(gather_pairs(scored, plan, world), plan.mean_chosen_tokens, running)
        sums = of_all if world.is_main else sums
    return sums
