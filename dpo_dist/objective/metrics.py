"""Metrics travel as sums and a count: their means do not depend on who computed which pair (law L1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_dist.config.schema import LossConfig
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import implicit_rewards

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class MetricSums:
    """Weighted sums over pairs, ready to be added over micro-batches and ranks.

    `values` is float64 [len(PAIR_METRICS) + 1], the last entry the sum of the weights.
    """

    values: Tensor

    @staticmethod
    def zeros(device: torch.device) -> "MetricSums":
        """The sums of no pairs."""
        return MetricSums(torch.zeros(len(PAIR_METRICS) + 1, dtype=torch.float64, device=device))

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(self.values + other.values)

    def means(self) -> dict[str, float]:
        """Mean of every metric over the pairs; copies to the host once."""
        *sums, count = self.values.tolist()
        return {name: total / count for name, total in zip(PAIR_METRICS, sums, strict=True)}


@torch.no_grad()
def metric_sums(
    losses: Tensor, policy: PairLogps, reference: PairLogps | None, config: LossConfig, weights: Tensor
) -> MetricSums:
    """Sums of `PAIR_METRICS` over these pairs.

    Args:
        losses: float32 [pairs], of `preference_loss`.
        policy: the policy's log-probs.
        reference: the reference's, or None.
        config: the loss that defines the rewards.
        weights: float32 [pairs], 1 for a pair of the batch, 0 for a dummy.
    """
    rewards = implicit_rewards(policy, reference, config)
    margins = rewards.chosen - rewards.rejected
    accuracies = (margins > 0).float() + 0.5 * (margins == 0).float()
    columns = torch.stack(
        (
            losses.detach(),
            rewards.chosen,
            rewards.rejected,
            accuracies,
            margins,
            policy.chosen.detach(),
            policy.rejected.detach(),
            torch.ones_like(margins),
        )
    )
    return MetricSums((columns.double() * weights.double()).sum(dim=1))
