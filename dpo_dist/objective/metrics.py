"""Metrics travel as sums and a count: their means do not depend on who computed which pair (law L1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_dist.config.loss_kinds import BcoDelta, LossConfig
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import implicit_rewards, log_ratios, scaled_margin

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


_ONE_SIDED_METRICS = ("loss", "rewards/chosen", "logps/chosen")
BATCH_MARGIN = "loss/margin"
"""Mean of `b h`, reported where the loss depends on it."""
BATCH_REWARD = "loss/reward"
"""Mean of `b (Dw + Dl) / 2`, reported where the loss depends on it."""


def metric_names(config: LossConfig) -> tuple[str, ...]:
    """What is measured of each pair, in the order in which its sums travel."""
    names = _ONE_SIDED_METRICS if config.is_one_sided else PAIR_METRICS
    margin = (BATCH_MARGIN,) if config.uses("beta_momentum") else ()
    reward = (BATCH_REWARD,) if config.bco_delta is BcoDelta.running_mean else ()
    return (*names, *margin, *reward)


@dataclass(frozen=True)
class MetricSums:
    """Weighted sums over pairs, ready to be added over micro-batches and ranks.

    `values` is float64 [len(names) + 1], the last entry the sum of the weights.
    """

    names: tuple[str, ...]
    values: Tensor

    @staticmethod
    def zeros(names: tuple[str, ...], device: torch.device) -> "MetricSums":
        """The sums of no pairs."""
        return MetricSums(names, torch.zeros(len(names) + 1, dtype=torch.float64, device=device))

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(self.names, self.values + other.values)

    def means(self) -> dict[str, float]:
        """Mean of every metric over the pairs; copies to the host once."""
        *sums, count = self.values.tolist()
        return {name: total / count for name, total in zip(self.names, sums, strict=True)}


@torch.no_grad()
def metric_sums(
    losses: Tensor, policy: PairLogps, reference: PairLogps | None, config: LossConfig, weights: Tensor
) -> MetricSums:
    """Sums of `metric_names(config)` over these pairs; of a ranking its best and its worst response count.

    Args:
        losses: [pairs], of `preference_loss`.
        policy: the policy's log-probs.
        reference: the reference's, or None.
        config: the loss that defines the rewards.
        weights: float32 [pairs], 1 for a pair of the batch, 0 for a dummy.
    """
    rewards = implicit_rewards(policy, reference, config)
    margins = rewards.chosen - rewards.rejected
    measured = {
        "loss": losses.detach(),
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/accuracies": (margins > 0) + 0.5 * (margins == 0),
        "rewards/margins": margins,
        "logps/chosen": policy.chosen.detach(),
        "logps/rejected": policy.rejected.detach(),
    }
    ratios = log_ratios(policy, reference, config)
    if config.uses("beta_momentum"):
        measured[BATCH_MARGIN] = scaled_margin(ratios, config)
    if config.bco_delta is BcoDelta.running_mean:
        measured[BATCH_REWARD] = config.beta * (ratios.chosen + ratios.rejected) / 2
    names = metric_names(config)
    columns = torch.stack([*(measured[name] for name in names), torch.ones_like(margins)])
    return MetricSums(names, (columns.double() * weights.double()).sum(dim=1))
