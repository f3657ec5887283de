"""Values of single pairs, of which evaluations report percentiles, intervals and scores."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_dist.config.loss_kinds import LossConfig
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import implicit_rewards

Values = npt.NDArray[np.float32]

_PERCENTS = (5, 25, 50, 75, 95)
MARGIN_PERCENTILES = tuple(f"rewards/margins/p{percent:02}" for percent in _PERCENTS)
"""Metrics of evaluations: percentiles of the margin over pairs."""


@dataclass(frozen=True, eq=False)
class PairValues:
    """Values of the pairs of a dataset in its order, float32 [pairs] each; a ranking is its best and worst.

    Attributes:
        reward_chosen: implicit reward.
        margin: difference of the rewards, taken before they are rounded.
        logp_chosen: the policy's log-prob of the response, as the loss sums it, in nats.
        reference_chosen: the reference's; nan without a reference.
        tokens_chosen: tokens that the loss counts.
    """

    reward_chosen: Values
    reward_rejected: Values
    margin: Values
    logp_chosen: Values
    logp_rejected: Values
    reference_chosen: Values
    reference_rejected: Values
    tokens_chosen: Values
    tokens_rejected: Values

    def __len__(self) -> int:
        return len(self.margin)

    @classmethod
    def joined(cls, parts: Iterable[tuple[npt.NDArray[np.int64], Values]], pairs: int) -> "PairValues":
        """Return the values of all `pairs`.

        Args:
            parts: positions of some pairs in the dataset, int64 [n], and their `pair_values`, [columns, n].
            pairs: of the dataset.
        """
        whole = np.full((len(fields(cls)), pairs), np.nan, dtype=np.float32)
        for positions, values in parts:
            whole[:, positions] = values
        return cls(*whole)

    def margin_percentiles(self) -> dict[str, float]:
        """Return `MARGIN_PERCENTILES`, interpolated between neighbours."""
        values = np.percentile(self.margin.astype(np.float64), _PERCENTS)
        return dict(zip(MARGIN_PERCENTILES, values.tolist(), strict=True))


@torch.no_grad()
def pair_values(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> Tensor:
    """Return float32 [columns, pairs] on the device, in the order of the fields of `PairValues`."""
    rewards = implicit_rewards(policy, reference, loss)
    missing = torch.full_like(policy.chosen, torch.nan)
    columns = (
        rewards.chosen,
        rewards.rejected,
        rewards.chosen - rewards.rejected,
        policy.chosen,
        policy.rejected,
        missing if reference is None else reference.chosen,
        missing if reference is None else reference.rejected,
        policy.chosen_tokens,
        policy.rejected_tokens,
    )
    return torch.stack([column.float() for column in columns])
