"""One optimizer step and one evaluation, as sums over this rank's micro-batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_dist.config.schema import LossConfig
from dpo_dist.data.batches import StepPlan
from dpo_dist.data.pack import PackedBatch
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.objective.logps import PairLogps, sum_by_response
from dpo_dist.objective.losses import preference_loss
from dpo_dist.objective.metrics import MetricSums, metric_sums
from dpo_dist.reference.provider import ReferenceProvider


@dataclass(frozen=True)
class Objective:
    """What a micro-batch is measured by: the loss and where its reference values come from."""

    loss: LossConfig
    reference: ReferenceProvider

    def measure(
        self, policy: PolicyEngine, batch: PackedBatch, mean_chosen_tokens: float
    ) -> tuple[Tensor, MetricSums]:
        """Sum of the batch's losses, with a graph where gradients are on, and its metric sums."""
        reference = self.reference_logps(batch)
        logps = sum_by_response(policy.token_logps(batch), batch.response_tokens)
        losses = preference_loss(logps, reference, self.loss, mean_chosen_tokens)
        sums = metric_sums(losses, logps, reference, self.loss, batch.weights)
        return (losses * batch.weights).sum(), sums

    def reference_logps(self, batch: PackedBatch) -> PairLogps | None:
        """The reference's log-probs of the batch's pairs, without a graph."""
        token_logps = self.reference.token_logps(batch)
        return None if token_logps is None else sum_by_response(token_logps, batch.response_tokens)


def train_step(
    policy: PolicyEngine, objective: Objective, plan: StepPlan, rate: float, device: torch.device
) -> tuple[MetricSums, float]:
    """Forward, backward and update over one global batch; collective.

    Returns:
        This rank's metric sums, and the gradient norm, infinite where no weight was changed because it was
        not finite (the same on all ranks).
    """
    policy.train()
    sums = MetricSums.zeros(device)
    last = len(plan.micro_batches) - 1
    for index, batch in enumerate(plan.batches()):
        loss, batch_sums = objective.measure(policy, batch.to(device), plan.mean_chosen_tokens)
        policy.backward(loss / plan.pairs, is_last=index == last)
        sums += batch_sums
    return sums, policy.step(rate)


@torch.no_grad()
def evaluate(policy: PolicyEngine, objective: Objective, plan: StepPlan, device: torch.device) -> MetricSums:
    """This rank's metric sums over the pairs of `plan`; collective."""
    policy.train(False)
    sums = MetricSums.zeros(device)
    for batch in plan.batches():
        _, batch_sums = objective.measure(policy, batch.to(device), plan.mean_chosen_tokens)
        sums += batch_sums
    return sums
