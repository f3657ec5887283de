"""Means over earlier steps that a loss depends on; part of every checkpoint."""

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from dpo_dist.config.loss_kinds import LossConfig

_Margin = TypeVar("_Margin", float, Tensor)


@dataclass(frozen=True)
class RunningMeans:
    """Means over the earlier steps of a run, equal on all ranks.

    Attributes:
        margin: moving average over steps of the mean of `b h` (M0 of `beta_dpo`); None before the first step.
        reward: mean over all pairs so far of the mean reward of their two responses (d of `bco_pair`).
        pairs: number of pairs in `reward`.
    """

    margin: float | None = None
    reward: float = 0.0
    pairs: int = 0

    def batch_beta(self, config: LossConfig, mean_margin: _Margin) -> _Margin:
        """Return `b' = b (1 + a (mean M - M0))` of a batch; `b` in the first step.

        Source: arXiv 2407.08639, equation 9.
        """
        start = mean_margin if self.margin is None else self.margin
        return config.beta * (1 + config.beta_alpha * (mean_margin - start))

    def after(self, config: LossConfig, mean_margin: float, mean_reward: float, pairs: int) -> "RunningMeans":
        """Return the means that include one more step.

        Args:
            config: the loss.
            mean_margin: mean of `b h` over the step's pairs.
            mean_reward: mean of `b D` over both responses of these pairs.
            pairs: number of these pairs.
        """
        kept = config.beta_momentum
        before = mean_margin if self.margin is None else self.margin
        total = self.pairs + pairs
        return RunningMeans(
            margin=kept * before + (1 - kept) * mean_margin,
            reward=self.reward + (mean_reward - self.reward) * pairs / total,
            pairs=total,
        )
