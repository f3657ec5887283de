"""Metrics of a global batch as sums and counts: exact means for any split of its pairs (law L1).

docs/watching.md explains each metric.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.metrics import (
    AGREEMENT,
    AUC,
    CUSTOM,
    ENTROPIES,
    EXCESS,
    GROUP_METRICS,
    MARGIN_PERCENTILES,
    MISMATCH,
    PAIR_METRICS,
    PERCENTS,
    TERMS,
)
from dpo_dist.config.schema import METRICS_FUNCTION
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.user_code import user_function
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import (
    TRIAL_LOGPS,
    BatchFacts,
    floors,
    implicit_rewards,
    log_ratios,
    score_margin,
)
from dpo_dist.objective.router import AUX_LOSS, BUSIEST

BUCKETS = ("1-63", "64-127", "128-255", "256-511", "512-1023", "1024-")
"""Tokens of the longer response of a pair, for metrics by length: `<metric>_by_length/<bucket>`."""
LENGTH_BORDERS = (64, 128, 256, 512, 1024)
"""Smallest length of each bucket after the first."""
BATCH_MARGIN = "loss/margin"
"""Mean of `b h`, reported if the loss depends on it."""
BATCH_REWARD = "loss/reward"
"""Mean of `b (Dw + Dl) / 2`, reported if the loss depends on it."""
_PAIRED_METRICS = ("rewards/accuracies", "rewards/both_fall")
_MARGIN = "rewards/margins"
_SIDES = ("rewards/chosen", "rewards/rejected")
_LABEL_METRICS = (*_SIDES, _MARGIN)
_OF_LOGPS = ("logps/", "distance/", "entropy/", "rewards/both_fall")
"""Beginnings of the names of metrics that a reward model does not have."""
_LENGTH_GROUPS = tuple(f"_by_length/{bucket}" for bucket in BUCKETS)


@dataclass(frozen=True)
class CustomMetrics:
    """The metrics of `metrics.function`, with their names in rows, `custom/NAME`; by default none."""

    function: str | None = None
    names: tuple[str, ...] = ()

    def compute(self, policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> dict[str, Tensor]:
        """Return the values of each pair by name, float64 [pairs]. ConfigError: wrong names or shapes."""
        if self.function is None:
            return {}
        values = user_function(self.function, METRICS_FUNCTION)(policy, reference, loss)
        columns = {CUSTOM + name: values[name].double() for name in values}
        place = policy.chosen
        is_wrong = any(
            (column.shape, column.device) != (place.shape, place.device) for column in columns.values()
        )
        if is_wrong or not columns or set(self.names or columns) != set(columns):
            shapes = (f"{name}: {list(column.shape)} on {column.device}" for name, column in columns.items())
            raise _custom_error(f"{', '.join(shapes) or 'nothing'}, of {len(place)} pairs on {place.device}")
        return {name: columns[name] for name in self.names or columns}


@torch.no_grad()
def custom_metrics(
    function: str | None, loss: LossConfig, device: torch.device | None = None
) -> CustomMetrics:
    """Return the metrics of a user's function, which is called on three invented pairs on `device`.

    If the loss reads one response of each pair (`is_unpaired`, `is_one_sided`), the other one has log-prob 0
    and 0 tokens, as in training.
    Raises ConfigError: the function cannot be used.
    """
    columns = torch.tensor(TRIAL_LOGPS, device=device).double()
    if function is None:
        return CustomMetrics()
    if loss.is_unpaired or loss.is_one_sided:
        is_good = torch.tensor([True, not loss.is_unpaired, True], device=device)
        columns[[0, 2, 4]] *= is_good
        columns[[1, 3, 5]] *= ~is_good

    def compute(pairs: Tensor) -> dict[str, Tensor]:
        policy = PairLogps(*pairs[:2], *pairs[4:])
        reference = PairLogps(*pairs[2:4], *pairs[4:]) if loss.needs_reference else None
        return CustomMetrics(function).compute(policy, reference, loss)

    try:
        values = compute(columns)
        first = compute(columns[:, :1])
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the user's code can raise anything, and call sys.exit
        raise _custom_error(f"{type(error).__name__}: {error}") from error
    for name, value in values.items():
        is_named = re.fullmatch(r"[\w.-]+", name.removeprefix(CUSTOM))
        if not (is_named and value.isfinite().all() and torch.allclose(value[:1], first[name])):
            raise _custom_error(
                f"{name}: {value.tolist()}, and {first[name].tolist()} of the first pair alone"
            )
    return CustomMetrics(function, tuple(values))


def _custom_error(got: str) -> ConfigError:
    return ConfigError(
        "the metrics function cannot be used",
        where=METRICS_FUNCTION,
        got=got,
        expected="a dict of the same names at each call (letters, digits and _ . -), with tensors [pairs] on "
        "the device of the log-probs: finite values that depend only on their own pair; a missing response "
        "has 0 tokens and log-prob 0",
        remedy="correct the function; docs/python.md describes its arguments and what it must return",
    )


@dataclass(frozen=True)
class MetricPlan:
    """The metrics of the steps, or of the evaluations, of a run.

    `labels`: the sources' labels; none if there is only one. `has_floor`: soft labels keep the loss above 0.
    """

    loss: LossConfig
    labels: tuple[str, ...] = ()
    is_evaluation: bool = False
    custom: CustomMetrics = CustomMetrics()
    has_floor: bool = False

    @cached_property
    def pair_metric_names(self) -> tuple[str, ...]:
        """Metrics of all pairs, without those that only some losses have."""
        names = PAIR_METRICS + ENTROPIES if self.is_evaluation else PAIR_METRICS
        measured: Iterable[str] = names
        if self.loss.is_one_sided:
            measured = (name for name in names if name == "loss" or "/chosen" in name)
        elif self.loss.is_unpaired:
            measured = (name for name in names if name not in _PAIRED_METRICS)
        elif self.loss.of_scores:
            measured = (name for name in names if not name.startswith(_OF_LOGPS))
        return (*measured, *(TERMS[term.kind] for term in self.loss.terms), *self.custom.names)

    @cached_property
    def rows(self) -> dict[str, tuple[str, str]]:
        """For each name its metric and its group of pairs, in the order of the sums.

        Groups are all pairs (""), sources and lengths. Evaluations have every metric of each source.
        """
        loss = self.loss
        has_aux = not self.is_evaluation and self.loss.router.aux_coefficient is not None
        conditional = {
            AUC: loss.is_unpaired,
            MISMATCH: loss.needs_partners,
            EXCESS: self.has_floor,
            AGREEMENT: loss.needs_teacher and self.is_evaluation,
            BATCH_MARGIN: LossKind.beta_dpo in loss.kinds,
            BATCH_REWARD: loss.has_running_reward,
            AUX_LOSS: has_aux,
            BUSIEST: has_aux,
        }
        group_metrics = _LABEL_METRICS if loss.is_unpaired else GROUP_METRICS
        grouped = [metric for metric in group_metrics if metric in self.pair_metric_names]
        rows = [(metric, "") for metric in self.pair_metric_names]
        rows += [(metric, "") for metric, is_measured in conditional.items() if is_measured]
        sources = [f"/{label}" for label in self.labels]
        rows += itertools.product(self.pair_metric_names if self.is_evaluation else grouped, sources)
        rows += itertools.product(grouped, _LENGTH_GROUPS)
        return {metric + group: (metric, group) for metric, group in rows}


@dataclass(frozen=True)
class ScoredPairs:
    """Log-probs of the pairs of a micro-batch, or of the global batch for coupled losses.

    `weights`, [pairs]: 1 for a pair, 0 for a dummy. `distance` (policy minus reference log-prob, absolute)
    and `entropy` of the tokens, in nats, and their `agreement` with a teacher, 0 or 1, summed by response, if
    measured. `sources`, int64 [pairs]: index of
    each pair's source in `MetricPlan.labels`. `routing`: `objective.router.routing_sums`, if the run has
    router losses.
    """

    policy: PairLogps
    reference: PairLogps | None
    weights: Tensor
    facts: BatchFacts = field(default_factory=BatchFacts)
    distance: PairLogps | None = None
    entropy: PairLogps | None = None
    agreement: PairLogps | None = None
    sources: Tensor | None = None
    routing: Tensor | None = None


@dataclass(frozen=True)
class MetricSums:
    """Weighted sums and counts over pairs, to be added over micro-batches and ranks.

    `values` is float64 [2 * len(names)]: the sum of each metric, then the count of each.
    """

    names: tuple[str, ...]
    values: Tensor

    @staticmethod
    def zeros(plan: MetricPlan, device: torch.device) -> "MetricSums":
        """Return sums and counts of 0."""
        names = tuple(plan.rows)
        return MetricSums(names, torch.zeros(2 * len(names), dtype=torch.float64, device=device))

    def plus_values(self, values: Mapping[str, Tensor], count: int) -> "MetricSums":
        """Return these sums with scalars of the whole step added, each counted `count` times.

        A scalar's parts add up over micro-batches and ranks; only one part has a count.
        """
        added = torch.zeros_like(self.values)
        for name, value in values.items():
            place = self.names.index(name)
            added[place] = value.detach()
            added[place + len(self.names)].fill_(count)  # an assigned number would be copied from the host
        return MetricSums(self.names, self.values + added)

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(self.names, self.values + other.values)

    def means(self) -> dict[str, float]:
        """Return the mean of every metric; one device-to-host copy."""
        return metric_means(*self.by_name(self.values.tolist()))

    def by_name(self, values: Sequence[float]) -> tuple[dict[str, float], dict[str, float]]:
        """Return sums and counts by name, given the first 2 * len(names) of `values` on the host."""
        counts = values[len(self.names) : 2 * len(self.names)]
        return dict(zip(self.names, values, strict=False)), dict(zip(self.names, counts, strict=True))


def metric_means(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of every metric that has a count above 0.

    Labelled records have no pairs: their margin is the difference of both sides' mean rewards. The loss is 0
    if all weights are 0.
    """
    means = {name: total / counts[name] for name, total in sums.items() if counts[name]}
    for name in ("loss", EXCESS, *TERMS.values()):
        if name in sums:
            means.setdefault(name, 0.0)
    for name in sums:
        if name.startswith(_MARGIN) and name not in means:
            group = name.removeprefix(_MARGIN)
            chosen = means.get(f"rewards/chosen{group}")
            rejected = means.get(f"rewards/rejected{group}")
            if chosen is not None and rejected is not None:
                means[name] = chosen - rejected
    return means


def wins(good: Tensor, bad: Tensor) -> Tensor:
    """Count how often a good value is above a bad one; a tie counts half. nan if any value is."""
    # By ranks in the sorted list, in place of all pairs of values; the last term carries a nan on.
    ordered = bad.double().sort().values
    above = torch.searchsorted(ordered, good.double()) + torch.searchsorted(
        ordered, good.double(), right=True
    )
    return above.sum() / 2 + 0.0 * (good.sum() + bad.sum())


@torch.no_grad()
def label_rewards(pairs: ScoredPairs, loss: LossConfig) -> Tensor:
    """Return the reward of each labelled record, float64 [pairs]; the missing side's reward is 0."""
    rewards = implicit_rewards(pairs.policy, pairs.reference, loss)
    return rewards.chosen + rewards.rejected


@torch.no_grad()
def metric_sums(
    plan: MetricPlan,
    losses: Tensor,
    pairs: ScoredPairs,
    terms: Mapping[LossKind, Tensor] = MappingProxyType({}),
) -> MetricSums:
    """Return the sums of `plan.rows` over these pairs; a ranking counts as its best and worst response.

    `terms`: as `loss_and_terms` returns them.
    """
    loss = plan.loss
    policy = pairs.policy
    zeros = torch.zeros_like(pairs.policy.chosen)
    ones = torch.ones_like(zeros)
    columns = _columns(plan, policy, pairs.reference)
    ratios = log_ratios(policy, pairs.reference, loss)
    measured = measure_pairs(columns)
    weight = ones if pairs.facts.loss_weight is None else pairs.facts.loss_weight
    measured["loss"] = losses.detach() * weight, weight
    measured |= {TERMS[kind]: (values * weight, weight) for kind, values in terms.items()}
    if plan.has_floor:
        measured[EXCESS] = (losses.detach() - floors(loss, pairs.facts)) * weight, weight
    measured[BATCH_MARGIN] = loss.beta * score_margin(ratios, loss), ones
    measured[BATCH_REWARD] = loss.beta * (ratios.chosen + ratios.rejected) / 2, ones
    for name, sums in (("distance", pairs.distance), ("entropy", pairs.entropy)):
        if sums is not None:  # counted by tokens: the batch's sum of values is divided by its sum of tokens
            measured[f"{name}/chosen"] = sums.chosen, sums.chosen_tokens
            measured[f"{name}/rejected"] = sums.rejected, sums.rejected_tokens
    if pairs.agreement is not None:
        measured[AGREEMENT] = pairs.agreement.chosen, pairs.agreement.chosen_tokens
    members = {"": ones} | length_members(columns)
    if pairs.sources is not None:
        members |= {f"/{label}": pairs.sources == number for number, label in enumerate(plan.labels)}
    # Every rank and micro-batch has the same rows, so that sums add up by place; what was not measured is 0.
    rows = [(*measured.get(metric, (zeros, zeros)), group) for metric, group in plan.rows.values()]
    values = torch.stack([row.double() for row, _, _ in rows])
    counts = torch.stack([(row * members.get(group, zeros)).double() for _, row, group in rows])
    # A value whose count is 0, or of a dummy, may be nan, which would make the sum nan: 0 in its place.
    summed = torch.cat((torch.where((counts > 0) & (pairs.weights > 0), values, 0.0), counts))
    return MetricSums(tuple(plan.rows), (summed * pairs.weights.double()).sum(dim=1))


def _columns(plan: MetricPlan, policy: PairLogps, reference: PairLogps | None) -> dict[str, Tensor]:
    """Return `PairValues.by_name`, [pairs] each, on the device."""
    rewards = implicit_rewards(policy, reference, plan.loss)
    missing = torch.full_like(policy.chosen, torch.nan)
    return {
        "reward_chosen": rewards.chosen,
        "reward_rejected": rewards.rejected,
        "margin": rewards.chosen - rewards.rejected,
        "logp_chosen": missing if plan.loss.of_scores else policy.chosen.detach(),
        "logp_rejected": missing if plan.loss.of_scores else policy.rejected.detach(),
        "reference_chosen": missing if reference is None else reference.chosen,
        "reference_rejected": missing if reference is None else reference.rejected,
        "tokens_chosen": policy.chosen_tokens,
        "tokens_rejected": policy.rejected_tokens,
        **plan.custom.compute(policy, reference, plan.loss),
    }


def measure_pairs(columns: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each metric the values and the counts of the pairs, given the fields of `PairValues`.

    A metric is the sum of values divided by the sum of counts: pairs, tokens, or pairs with a reference.
    """
    margin = columns["margin"]
    ones = torch.ones_like(columns["margin"])
    has = {side: (columns[f"tokens_{side}"] > 0).to(margin) for side in ("chosen", "rejected")}
    paired = has["chosen"] * has["rejected"]
    falls = (columns["logp_chosen"] < columns["reference_chosen"]) & (
        columns["logp_rejected"] < columns["reference_rejected"]
    )
    measured = {
        # Keep NaN: comparing a NaN margin would silently count as False.
        "rewards/accuracies": (
            torch.where(margin.isnan(), margin, (margin > 0) + 0.5 * (margin == 0)),
            paired,
        ),
        "rewards/margins": (margin, paired),
        "rewards/both_fall": (
            torch.where(margin.isnan(), margin, falls),
            torch.isfinite(columns["reference_chosen"]),
        ),
    }
    for side in ("chosen", "rejected"):
        logp = columns[f"logp_{side}"]
        tokens = columns[f"tokens_{side}"]
        measured[f"rewards/{side}"] = columns[f"reward_{side}"], has[side]
        measured[f"logps/{side}"] = logp, has[side]
        measured[f"logps/{side}_per_token"] = logp, tokens
        measured[f"tokens/{side}"] = tokens, has[side]
    return measured | {name: (value, ones) for name, value in columns.items() if name.startswith(CUSTOM)}


def length_members(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return for each bucket of lengths, by its group in `MetricPlan.rows`, which pairs are in it."""
    longer = torch.maximum(columns["tokens_chosen"], columns["tokens_rejected"])
    buckets = torch.stack([longer >= border for border in LENGTH_BORDERS]).sum(dim=0)
    return {group: buckets == number for number, group in enumerate(_LENGTH_GROUPS)}


PairColumn = npt.NDArray[np.float32]
"""A value of each pair: float32 [pairs]."""


@dataclass(frozen=True, eq=False)
class PairValues:
    """Values of a dataset's pairs in its order, float32 [pairs]; a ranking counts as its best and worst."""

    reward_chosen: PairColumn
    reward_rejected: PairColumn
    margin: PairColumn  # difference of the rewards, taken before they are rounded
    logp_chosen: PairColumn  # the policy's log-prob of the response, as the loss sums it, in nats
    logp_rejected: PairColumn
    reference_chosen: PairColumn  # the reference's log-prob; nan without a reference
    reference_rejected: PairColumn
    tokens_chosen: PairColumn  # tokens that the loss counts
    tokens_rejected: PairColumn
    custom: Mapping[str, PairColumn] = field(default_factory=dict)  # by the names of `CustomMetrics`

    @classmethod
    def from_columns(cls, columns: Mapping[str, PairColumn]) -> "PairValues":
        """Return the values of columns `by_name`."""
        custom = {name: column for name, column in columns.items() if name.startswith(CUSTOM)}
        return cls(**{name: columns[name] for name in columns if name not in custom}, custom=custom)

    @property
    def by_name(self) -> dict[str, PairColumn]:
        """All values by name."""
        return {name: column for name, column in vars(self).items() if name != "custom"} | {**self.custom}

    def __len__(self) -> int:
        return len(self.margin)

    @property
    def columns(self) -> dict[str, Tensor]:
        """The fields as tensors, for `measure_pairs`."""
        return {name: torch.from_numpy(column) for name, column in self.by_name.items()}

    def margin_percentiles(self) -> dict[str, float]:
        """Return `MARGIN_PERCENTILES`, interpolated between neighbours."""
        values = np.percentile(self.margin.astype(np.float64), PERCENTS)
        return dict(zip(MARGIN_PERCENTILES, values.tolist(), strict=True))

    def auc_by_source(self, labels: Sequence[str], numbers: npt.NDArray[np.integer[Any]]) -> dict[str, float]:
        """Return the AUC of each source that has good and bad responses, by its label in `labels`.

        `numbers`, [pairs]: the source of each labelled record, as its place in `labels`.
        """
        measured = dict[str, float]()
        for number, label in enumerate(labels):
            in_source = numbers == number
            good = torch.from_numpy(self.reward_chosen[in_source & (self.tokens_chosen > 0)])
            bad = torch.from_numpy(self.reward_rejected[in_source & (self.tokens_rejected > 0)])
            if len(good) and len(bad):
                measured[f"{AUC}/{label}"] = float(wins(good, bad)) / (len(good) * len(bad))
        return measured


@torch.no_grad()
def pair_values(plan: MetricPlan, policy: PairLogps, reference: PairLogps | None) -> dict[str, Tensor]:
    """Return `PairValues.by_name`, float32 [pairs] each on the device."""
    return {name: column.float() for name, column in _columns(plan, policy, reference).items()}
