"""Metrics of a global batch as sums and counts: exact means for any split of its pairs (law L1)."""

from collections.abc import Mapping, Sequence
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
SOURCE_METRICS = ("rewards/accuracies", "rewards/margins")
"""Metrics that are also reported for each source, as `<metric>/<label>`."""
_ONE_SIDED_METRICS = ("loss", "rewards/chosen", "logps/chosen")
BATCH_MARGIN = "loss/margin"
"""Mean of `b h`, reported if the loss depends on it."""
BATCH_REWARD = "loss/reward"
"""Mean of `b (Dw + Dl) / 2`, reported if the loss depends on it."""


def metric_names(config: LossConfig, labels: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the metrics of this loss, in the order of their sums.

    `labels`: of the sources of the data; none if there is only one.
    """
    names = _ONE_SIDED_METRICS if config.is_one_sided else PAIR_METRICS
    margin = (BATCH_MARGIN,) if config.uses("beta_momentum") else ()
    reward = (BATCH_REWARD,) if config.bco_delta is BcoDelta.running_mean else ()
    by_source = (f"{name}/{label}" for name in SOURCE_METRICS if name in names for label in labels)
    return (*names, *margin, *reward, *by_source)


@dataclass(frozen=True)
class PairSources:
    """Sources of pairs.

    Attributes:
        labels: of all sources.
        numbers: int64 [pairs], index of each pair's source in `labels`.
    """

    labels: tuple[str, ...]
    numbers: Tensor


@dataclass(frozen=True)
class Counted:
    """A metric with a count of its own: the sum of `values` over the batch divided by the sum of `counts`.

    Attributes:
        values: [pairs], for example log-probs summed over tokens; ignored where the count is 0.
        counts: [pairs], for example numbers of tokens, or 1 for the pairs that have scores.
    """

    values: Tensor
    counts: Tensor


@dataclass(frozen=True)
class MetricSums:
    """Weighted sums and counts over pairs, to be added over micro-batches and ranks.

    `values` is float64 [2 * len(names)]: the sum of each metric, then the count of each.
    """

    names: tuple[str, ...]
    values: Tensor

    @staticmethod
    def zeros(names: tuple[str, ...], device: torch.device) -> "MetricSums":
        """Return the sums of no pairs."""
        return MetricSums(names, torch.zeros(2 * len(names), dtype=torch.float64, device=device))

    @staticmethod
    def of(measured: Mapping[str, Tensor | Counted], weights: Tensor) -> "MetricSums":
        """Sum metrics over pairs of weight 1; dummies have weight 0.

        Args:
            measured: by name, a value for each pair, [pairs], or `Counted`.
            weights: float32 [pairs].
        """
        values, counts = map(_stacked, zip(*map(_values_and_counts, measured.values()), strict=True))
        columns = torch.cat((torch.where(counts > 0, values, 0.0), counts))
        return MetricSums(tuple(measured), (columns * weights.double()).sum(dim=1))

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(self.names, self.values + other.values)

    def means(self) -> dict[str, float]:
        """Return the mean of every metric; one device-to-host copy."""
        return metric_means(*self.named(self.values.tolist()))

    def named(self, values: Sequence[float]) -> tuple[dict[str, float], dict[str, float]]:
        """Return sums and counts by name, given the first 2 * len(names) of `values` on the host."""
        middle, end = len(self.names), 2 * len(self.names)
        return (
            dict(zip(self.names, values[:middle], strict=True)),
            dict(zip(self.names, values[middle:end], strict=True)),
        )


def metric_means(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of every metric that has a count above 0."""
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}


@torch.no_grad()
def metric_sums(
    losses: Tensor,
    policy: PairLogps,
    reference: PairLogps | None,
    config: LossConfig,
    weights: Tensor,
    sources: PairSources | None = None,
) -> MetricSums:
    """Return the sums of `metric_names` over these pairs; of a ranking, its best and worst response.

    Args:
        losses: [pairs], of `preference_loss`.
        policy: the policy's log-probs.
        reference: the reference's, or None.
        config: the loss that defines the rewards.
        weights: float32 [pairs], 1 for a pair of the batch, 0 for a dummy.
        sources: of the pairs, if metrics are divided by source.
    """
    rewards = implicit_rewards(policy, reference, config)
    margins = rewards.chosen - rewards.rejected
    accuracies = (margins > 0) + 0.5 * (margins == 0)
    measured: dict[str, Tensor | Counted] = {
        "loss": losses.detach(),
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/accuracies": accuracies,
        "rewards/margins": margins,
        "logps/chosen": policy.chosen.detach(),
        "logps/rejected": policy.rejected.detach(),
    }
    ratios = log_ratios(policy, reference, config)
    if config.uses("beta_momentum"):
        measured[BATCH_MARGIN] = scaled_margin(ratios, config)
    if config.bco_delta is BcoDelta.running_mean:
        measured[BATCH_REWARD] = config.beta * (ratios.chosen + ratios.rejected) / 2
    if sources is not None:
        numbers = torch.arange(len(sources.labels), device=sources.numbers.device)
        is_of = (sources.numbers == numbers[:, None]).double()
        for label, counts in zip(sources.labels, is_of, strict=True):
            by_source = zip(SOURCE_METRICS, (accuracies, margins), strict=True)
            measured |= {f"{name}/{label}": Counted(values, counts) for name, values in by_source}
    names = metric_names(config, () if sources is None else sources.labels)
    return MetricSums.of({name: measured[name] for name in names}, weights)


def _values_and_counts(metric: Tensor | Counted) -> tuple[Tensor, Tensor]:
    if isinstance(metric, Counted):
        return metric.values, metric.counts
    return metric, torch.ones_like(metric)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Return float64 [rows, pairs]."""
    return torch.stack([row.double() for row in rows])
