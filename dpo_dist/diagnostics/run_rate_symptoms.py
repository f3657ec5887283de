"""Signs of a learning rate that is too high in the rows of a run: see `run_checks`."""

import math
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.config.loss_kinds import KINDS, LossKind, Weighting
from dpo_dist.diagnostics.run_facts import Row, RunFacts, finite, pooled, values

Column: TypeAlias = npt.NDArray[np.float64]

LOGISTIC = ("sigmoid", "robust", "dpop", "odpo")
"""Losses that fall to 0 with a growing margin; others have another scale, or grow again."""
_START = dict.fromkeys(
    ("sigmoid", "robust", "sigmoid_norm", "dpop", "aot", "aot_unpaired", "beta_dpo"), math.log(2)
) | {
    "hinge": 1.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "discopop": (1 + math.log(2)) / 2,
}
"""Loss of every pair while the policy is the reference."""
_SQUARED_START = {"ipo": 0.25, "sppo_hard": 0.5}
"""The same, times beta squared."""
_MEAN_OF = 3
"""Fewest rows of a mean: the loss of few pairs is noisy."""
_SPIKES = 0.1
"""Share of the rows, those of the highest losses, that alone are no rise of the loss."""
_DISTANCES = 8
"""Fewest distances between successive rows that give their noise."""
_FROM_MEAN, _FROM_MEDIAN = math.sqrt(math.pi) / 2, 1.0484
"""Standard deviation of normal values over the mean, or the median, of the distances of two of them."""
_FIRST_SPIKE = 5
"""Rows before which a gradient norm has no usual value."""


def symptoms_of_rate(facts: RunFacts, limits: Mapping[str, float]) -> Iterator[str]:
    """Yield a clause for each sign; `limits` are those of `learning_rate_too_high`."""
    yield from rise_of_loss(facts, limits)
    falls = falls_of_chosen(facts, limits)
    fallen = [(step, fall) for step, fall in falls if fall > limits["fall"]]
    early = fallen[:1] if len(fallen) >= limits["rows"] else []
    for step, fall in early:
        since = sum(later >= step for later, _ in falls)
        if step > limits["steps_share"] * facts.total_steps or 2 * len(fallen) < since:
            break  # late, or it has recovered
        yield (
            f"the log-prob of chosen responses fell by {fall:.2g} nats per token by step {step:.0f} of "
            f"{facts.total_steps:,}"
        )
    yield from _jumps_of_gradient(facts.steps, limits)


def known_start(facts: RunFacts) -> float | None:
    """Return the loss of every pair while the policy is the reference; None if pairs differ in it."""
    kind, beta = facts.setting("loss.kind"), facts.setting("loss.beta")
    is_weighted = facts.setting("loss.weighting") not in (None, Weighting.none)
    if is_weighted or not facts.starts_as_reference:
        return None
    if kind == LossKind.exo_pair:
        flipped = facts.setting("loss.label_smoothing") or KINDS[kind].smoothing
        return -math.log(2) - math.log(flipped * (1 - flipped)) / 2
    if kind in _SQUARED_START and beta:
        return _SQUARED_START[kind] / float(beta) ** 2
    return _START.get(kind)


def falls_of_chosen(facts: RunFacts, limits: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return step and fall of the log-prob of chosen responses during training, in nats per token.

    Relative to the reference, or to the first rows if that is not known; these have other responses.
    """
    falls = facts.falls(facts.steps)
    if falls is None:
        logps = pooled(facts.steps, "logps/chosen_per_token", limits["pairs"])
        falls = [(step, logps[0][1] - logp) for step, logp in logps]
    return falls


def rise_of_loss(facts: RunFacts, limits: Mapping[str, float]) -> Iterator[str]:
    """Yield a clause if the loss rose; `limits` are those of `learning_rate_too_high`.

    Means over 3, 6, 12, ... successive rows are compared with the start, by more than their noise. The
    highest losses count as the highest of the others: a spike that recovers is no sign of the learning rate.
    """
    rows = _with_loss(facts.steps)
    start = _start(facts, rows, limits)
    if start is None or start.mean <= 0:
        return
    losses, pairs = _column(rows, "loss"), _column(rows, "pairs")
    losses = np.minimum(losses, np.quantile(losses, 1 - _SPIKES, method="lower"))
    quantile = NormalDist().inv_cdf(1 - limits["chance"] / len(rows))  # the largest of so many means
    found = []
    size = _MEAN_OF
    while size <= len(rows) - start.rows:
        means = _sums(losses[start.rows :], size) / size
        many = _sums(pairs[start.rows :], size) >= start.fewest_pairs
        noise = quantile * np.hypot(_errors(losses, start.rows, size), limits["loss_rise"] * start.error)
        risen = np.flatnonzero(many & (means - noise > limits["loss_rise"] * start.mean))
        if len(risen):
            found.append((rows[start.rows + risen[0] + size - 1]["step"], means[risen[0]]))
        size *= 2
    if found:
        step, mean = min(found)
        yield f"the loss rose from {start.mean:.3g} to {mean:.3g} by step {step:.0f}"


@dataclass(frozen=True)
class _Start:
    """The loss of the start: its mean over the first `rows`, with a standard error."""

    mean: float
    error: float
    rows: int
    fewest_pairs: float


def _start(facts: RunFacts, rows: Sequence[Row], limits: Mapping[str, float]) -> _Start | None:
    """Return the start of the loss, or None if it is not known.

    Before the first update many losses are the same for all pairs, if the policy is the reference.
    """
    losses, pairs = _column(rows, "loss"), _column(rows, "pairs")
    if known_start(facts) is not None:
        return _Start(float(losses[0]), 0.0, 1, limits["pairs"]) if len(losses) else None
    fewest = limits["varied_pairs"]
    count = int(np.searchsorted(np.cumsum(pairs), fewest)) + 1
    if count > len(losses):
        return None
    error = _noise_of_rows(losses) / math.sqrt(count)
    return _Start(float(losses[:count].mean()), error, count, fewest)


def _jumps_of_gradient(steps: Sequence[Row], limits: Mapping[str, float]) -> Iterator[str]:
    logged = _with_loss(steps)
    norms = values(logged, "grad_norm")
    jumps = []
    before: list[float] = []  # in order: a median of every row's own would take hours for a long run
    for step, norm in norms:
        if len(before) >= _FIRST_SPIKE:
            usual = (before[(len(before) - 1) // 2] + before[len(before) // 2]) / 2
            if norm > max(limits["spike"] * usual, norms[0][1]):
                jumps.append((step, norm, usual))
        insort(before, norm)
    if len(jumps) < limits["rows"]:
        return
    step, norm, usual = jumps[0]
    at = sum(row["step"] < step for row in logged)
    if _ends_higher(_column(logged, "loss"), at, limits):  # not of a loss with steep parts, such as dpop
        yield f"the gradient norm jumped from {usual:.2g} to {norm:.2g} at step {step:.0f}"


def _ends_higher(losses: Column, at: int, limits: Mapping[str, float]) -> bool:
    """Return whether the last losses are above those before row `at`, by more than their noise."""
    size = max(_MEAN_OF, len(losses) // 10)
    before, after = losses[:at][-size:], losses[at:][-size:]
    noise = max(_noise_of_rows(losses), _FROM_MEAN * float(np.abs(np.diff(after, prepend=after[:1])).mean()))
    noise *= math.sqrt(math.pi / 2 * (1 / len(before) + 1 / len(after)))  # of medians
    return bool(np.median(after) - np.median(before) > NormalDist().inv_cdf(1 - limits["chance"]) * noise)


def _errors(losses: Column, start: int, size: int) -> Column:
    """Return the standard error of the mean of every `size` successive rows from row `start`.

    Their own noise and that of some rows before them, as losses of a confident policy differ more.
    """
    total = np.concatenate(([0.0], np.cumsum(np.abs(np.diff(losses)))))
    ends = np.arange(start + size - 1, len(losses))
    begins = np.maximum(ends - max(size - 1, _DISTANCES), start)
    own = _FROM_MEAN * (total[ends] - total[begins]) / (ends - begins)
    return np.maximum(own, _noise_of_rows(losses)) / math.sqrt(size)


def _noise_of_rows(losses: Column) -> float:
    """Return the standard deviation of a row's loss, by the differences of successive rows.

    A trend or a single jump is no noise: the median of the differences.
    """
    return _FROM_MEDIAN * float(np.median(np.abs(np.diff(losses)))) if len(losses) > 1 else 0.0


def _sums(column: Column, size: int) -> Column:
    """Return the sum of every `size` successive values."""
    total = np.concatenate(([0.0], np.cumsum(column)))
    return total[size:] - total[:-size]


def _with_loss(steps: Sequence[Row]) -> list[Row]:
    return [row for row in steps if finite(row, "loss") is not None]


def _column(rows: Sequence[Row], key: str) -> Column:
    return np.array([row.get(key, 0.0) for row in rows], dtype=np.float64)
