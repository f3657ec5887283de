"""One optimizer step and one evaluation, as sums over this rank's micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_dist.config.schema import LossConfig
from dpo_dist.data.batches import StepPlan
from dpo_dist.data.pack import PackedBatch
from dpo_dist.data.prefetch import prefetch
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.objective.logps import PairLogps, sum_by_response
from dpo_dist.objective.losses import preference_loss
from dpo_dist.objective.metrics import MetricSums, metric_sums
from dpo_dist.reference.provider import ReferenceProvider
from dpo_dist.training.clock import StepClock

BATCHES_AHEAD = 4


@dataclass(frozen=True)
class ReadyStep:
    """One global batch as this rank trains on it, with all its micro-batches on the host."""

    plan: StepPlan
    batches: Sequence[PackedBatch]


@dataclass(frozen=True)
class Objective:
    """What a micro-batch is measured by: the loss and where its reference values come from."""

    loss: LossConfig
    reference: ReferenceProvider

    def ready_batches(self, plan: StepPlan, device: torch.device) -> Iterator[PackedBatch]:
        """This rank's micro-batches in order, on the host, with all that can be done before they are needed:
        packed, stored reference values looked up, and in memory that a copy to `device` need not wait for.
        """
        for batch in plan.batches():
            ready = self.reference.attach(batch)
            yield ready.pinned() if device.type == "cuda" else ready

    def ready_step(self, plan: StepPlan, device: torch.device) -> ReadyStep:
        """All `ready_batches` of a training step."""
        return ReadyStep(plan, list(self.ready_batches(plan, device)))

    def measure(
        self,
        policy: PolicyEngine,
        batch: PackedBatch,
        reference: PairLogps | None,
        mean_chosen_tokens: float,
    ) -> tuple[Tensor, MetricSums]:
        """Sum of the batch's losses, with a graph where gradients are on, and its metric sums."""
        logps = sum_by_response(policy.token_logps(batch), batch.response_tokens)
        losses = preference_loss(logps, reference, self.loss, mean_chosen_tokens)
        sums = metric_sums(losses, logps, reference, self.loss, batch.weights)
        return (losses * batch.weights).sum(), sums

    def reference_logps(self, batch: PackedBatch) -> PairLogps | None:
        """The reference's log-probs of the batch's pairs, without a graph."""
        token_logps = self.reference.token_logps(batch)
        return None if token_logps is None else sum_by_response(token_logps, batch.response_tokens)


def train_step(
    policy: PolicyEngine,
    objective: Objective,
    step: ReadyStep,
    rate: float,
    device: torch.device,
    clock: StepClock,
) -> tuple[MetricSums, Tensor]:
    """Forward, backward and update over one global batch; collective.

    Returns:
        This rank's metric sums, and the gradient norm, a scalar on `device`, infinite where no weight was
        changed because it was not finite (the same on all ranks).
    """
    policy.train()
    sums = MetricSums.zeros(device)
    plan = step.plan
    for number, host_batch in enumerate(step.batches, start=1):
        clock.enter("data")
        batch = host_batch.to(device)
        clock.enter("reference")
        reference = objective.reference_logps(batch)
        clock.enter("forward")
        loss, batch_sums = objective.measure(policy, batch, reference, plan.mean_chosen_tokens)
        sums += batch_sums
        clock.enter("backward")
        policy.backward(loss / plan.pairs, is_last=number == len(step.batches))
    clock.enter("optimizer")
    grad_norm = policy.step(rate)
    clock.enter("other")
    return sums, grad_norm


@torch.no_grad()
def evaluate(policy: PolicyEngine, objective: Objective, plan: StepPlan, device: torch.device) -> MetricSums:
    """This rank's metric sums over the pairs of `plan`; collective."""
    policy.train(False)
    sums = MetricSums.zeros(device)
    with prefetch(objective.ready_batches(plan, device), BATCHES_AHEAD) as batches:
        for host_batch in batches:
            batch = host_batch.to(device)
            reference = objective.reference_logps(batch)
            _, batch_sums = objective.measure(policy, batch, reference, plan.mean_chosen_tokens)
            sums += batch_sums
    return sums
