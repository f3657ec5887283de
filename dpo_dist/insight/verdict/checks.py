"""Checks of a run's training: divergence, learning rate, beta, learning, over-fitting."""

import itertools
import math
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.config.losses import KINDS, LossKind, Weighting
from dpo_dist.foundation.text import counted, percent
from dpo_dist.insight.verdict.facts import (
    ACCURACY,
    MARGIN,
    Row,
    RunFacts,
    evaluation_rows,
    finite,
    first,
    last,
    number,
    pooled,
    values,
)
from dpo_dist.insight.verdict.rules import FEWEST_STEPS, RULES

Fields: TypeAlias = Mapping[str, Any]
Limits: TypeAlias = Mapping[str, float]

SPIKE = {"excursion": 5.0, "rows": 100, "fewest_rows": 50, "rise": 1.0}
"""A spike is above the median of the `rows` rows before it (at least `fewest_rows`) by more than `excursion`
times the largest among them, and than `rise` times that median and the first loss."""
_SIDES = "logps/chosen_per_token", "logps/rejected_per_token"
_EQUAL = 1e-9
"""Relative difference of means that only rounding makes different."""


def is_collapsed(row: Row, limits: Limits | None = None) -> bool:
    """Return whether the policy of a step has no gradient, and gives responses no usable probability.

    Either every token has the same probability, as after weights that overflow a normalisation layer, or
    that of responses is far below any guess. A loss that is satisfied (hinge, ipo) has no gradient either,
    but its policy still prefers some tokens.
    """
    chosen, rejected = (finite(row, side) for side in _SIDES)
    if row.get("grad_norm") != 0 or chosen is None:
        return False
    is_uniform = rejected is not None and abs(chosen - rejected) <= _EQUAL * abs(chosen)
    return is_uniform or chosen < -(limits or RULES["collapsed"].limits)["nats"]


def find_collapse(facts: RunFacts, limits: Limits) -> Fields | None:
    """Return the fields of the rule `collapsed`; the last rows count, as a policy may recover."""
    rows = [row for row in facts.steps if finite(row, "loss") is not None]
    first = len(rows)
    while first and is_collapsed(rows[first - 1], limits):
        first -= 1
    if first == len(rows):
        return None
    row = rows[first]
    return {
        "step": int(row["step"]),
        "chosen": number(row[_SIDES[0]]),
        "loss": number(last(rows[:first], "loss")),
        "rate": number(facts.setting("optim.lr")),
    }


@dataclass(frozen=True)
class Spike:
    """A row whose loss is far above those before: its step, its loss, and their median."""

    step: int
    loss: float
    usual: float


def spikes(rows: Sequence[Row], limits: Limits) -> list[Spike]:
    """Return the spikes among the rows of training steps."""
    logged = values(rows, "loss")
    losses = np.array([loss for _, loss in logged], dtype=np.float64)
    found = []
    for at in range(int(limits["fewest_rows"]), len(losses)):
        before = losses[max(0, at - int(limits["rows"])) : at]
        # Seldom true, and a median of every window is slow.
        if losses[at] > before.max() and _is_spike(before, losses[at], losses[0], limits):
            found.append(Spike(int(logged[at][0]), float(losses[at]), float(np.median(before))))
    return found


def _is_spike(before: npt.NDArray[np.float64], loss: float, first: float, limits: Limits) -> bool:
    usual = float(np.median(before))
    rise = loss - usual
    scale = max(abs(usual), abs(first))
    return rise > limits["excursion"] * (before.max() - usual) and rise > limits["rise"] * scale


def spike_of_last(rows: Sequence[Row], row: Row) -> Spike | None:
    """Return the spike of `row`, if it is one.

    Args:
        rows: all rows before it, of which the last ones are read.
        row: of training steps.
    """
    limits = SPIKE
    logged = (float(row["loss"]) for row in reversed(rows) if finite(row, "loss") is not None)
    before = np.array(list(itertools.islice(logged, int(limits["rows"]))), dtype=np.float64)
    loss = finite(row, "loss")
    if loss is None or len(before) < limits["fewest_rows"] or loss <= before.max():
        return None
    first = next(row["loss"] for row in rows if finite(row, "loss") is not None)
    if not _is_spike(before, loss, first, limits):
        return None
    return Spike(int(row["step"]), loss, float(np.median(before)))


def find_bad_steps(facts: RunFacts, limits: Limits) -> Fields | None:
    """Return the fields of the rule `bad_steps`."""
    bad = facts.summary.get("bad_steps", 0)
    if bad < limits["steps"]:
        return None
    return {"count": counted(bad, "step"), "steps": facts.total_steps}


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
_MOST_DISTANCES = 8
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
    begins = np.maximum(ends - max(size - 1, _MOST_DISTANCES), start)
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


Check: TypeAlias = Callable[[RunFacts, Limits], Fields | None]

_QUANTITIES = {
    "logps/chosen": "log-prob of chosen responses",
    "logps/rejected": "log-prob of rejected responses",
    "loss": "loss",
    "grad_norm": "gradient norm",
}
"""In the order in which a step computes them: the first one that is not finite is named."""
_DISTANCES = ("kl/", "eval_kl/")
_DISTANCE = "kl/rejected"
_TYPICAL_ROWS = 3
"""Fewest rows of steps whose median is compared."""
_LOWERS_CHOSEN = ("apo_down",)
"""Losses that make chosen responses less likely by design."""


def _diverged(facts: RunFacts, limits: Limits) -> Fields | None:
    for index, row in enumerate(facts.rows):
        # A divergence from the reference that float32 cannot hold is no fault of a step.
        broken = [key for key in row if not math.isfinite(row[key]) and not key.startswith(_DISTANCES)]
        if len(broken) < limits["values"]:
            continue
        keys = [key for key in (*_QUANTITIES, *broken) if key in broken or f"eval_{key}" in broken]
        before = facts.before(index)
        return {
            "cause": _cause_of_divergence(keys[0], row, before),
            "quantity": f"the {_QUANTITIES.get(keys[0], keys[0])}",
            "step": _first_bad_step(facts, row),
            "loss": number(last(before.steps, "loss")),
            "grad_norm": number(last(before.steps, "grad_norm")),
            "rate": number(last([row, *before.steps], "learning_rate")),
        }
    return None


def _first_bad_step(facts: RunFacts, row: Row) -> int:
    """Return the step of a row that is not finite; of the row that ends a run, the first skipped step."""
    skipped = facts.summary.get("bad_in_a_row") or 1
    return int(row["step"]) - (skipped - 1 if row is facts.rows[-1] and "loss" in row else 0)


def _cause_of_divergence(quantity: str, row: Row, before: RunFacts) -> str:
    """Return a sentence about the likeliest cause, given the facts before the row that is not finite."""
    weaker = {"rows": 1, "chance": 0.5}  # something did happen
    symptom = next(symptoms_of_rate(before, {**RULES["learning_rate_too_high"].limits, **weaker}), None)
    if symptom is not None:
        return f"the learning rate is too high: {symptom}"
    if "loss" not in row:
        return "the evaluation data have pairs for which the policy gives no finite value"
    if quantity.startswith("logps/"):
        if before.steps:
            return "an update damaged the weights: the learning rate is too high, or its warm-up too short"
        return "the model gives no finite log-probs from the start: damaged weights, or numbers out of range"
    if quantity == "loss":
        return "the formula of the loss has no finite value for log-probs that are finite"
    return "the backward overflows: loss and log-probs are finite, the gradient is not"


def _learning_rate_too_high(facts: RunFacts, limits: Limits) -> Fields | None:
    symptom = next(symptoms_of_rate(facts, limits), None)
    if symptom is None:
        return None
    return {"symptom": symptom, "rate": number(facts.setting("optim.lr"))}


def _far_from_reference(facts: RunFacts, limits: Limits) -> Fields | None:
    is_other = facts.setting("reference.path") is not None  # the policy does not start as the reference
    # An evaluation has other pairs than the first steps.
    rows = facts.steps if is_other else facts.last_rows
    distances = [row[_DISTANCE] for row in rows if not math.isnan(row.get(_DISTANCE, math.nan))]
    if not distances:
        return None
    # Infinite: beyond float32. Evaluations have the same pairs; of steps some tokens can decide one row.
    typical = 1 if rows is facts.evaluations else max(_TYPICAL_ROWS, len(distances) // 4)
    kl = median(distances[-typical:]) - (median(distances[:_TYPICAL_ROWS]) if is_other else 0.0)
    if not kl > limits["kl"]:
        return None
    distance = f"{kl:.2g} nats" if math.isfinite(kl) else "more nats than float32 can express"
    return {"distance": distance, "beta": number(facts.setting("loss.beta"))}


def _beta_too_large(facts: RunFacts, limits: Limits) -> Fields | None:
    found = _beta_and_change(facts)
    if found is None or facts.setting("loss.kind") not in LOGISTIC or found["beta"] < limits["beta"]:
        return None
    if abs(found["margin"]) > limits["margin"]:
        return None
    change = f"the log-prob of chosen minus rejected changed by only {found['margin']:.2g} nats"
    of_rate = RULES["learning_rate_too_high"].limits
    falls = [fall for _, fall in falls_of_chosen(facts, of_rate)]
    rise = next(rise_of_loss(facts, of_rate), None)
    if found["last"] <= limits["loss_share"] * max(found["first"], math.log(2)):
        loss = f"{found['first']:.2g} -> {found['last']:.2g}"
        symptom = f"the loss is used up ({loss}) after {change}: later steps teach nothing"
    elif rise is not None and falls and max(falls) <= limits["fall"]:
        symptom = f"{rise}, although {change}: every small difference decides a pair"
    else:
        return None
    return {"beta": number(found["beta"]), "symptom": symptom}


def _beta_too_small(facts: RunFacts, limits: Limits) -> Fields | None:
    found = _beta_and_change(facts)
    if found is None or facts.setting("loss.kind") not in LOGISTIC or found["margin"] < limits["margin"]:
        return None
    losses = _loss_that_stayed(facts, limits)
    return None if losses is None else {**found, **losses, "beta": number(found["beta"])}


def _loss_that_stayed(facts: RunFacts, limits: Limits) -> dict[str, float] | None:
    """Return the `first` loss and the mean over the `last` quarter of the steps if they are alike, or None.

    A single row of a run that learns may have the loss of its start by chance.
    """
    recent, start = _recent_losses(facts), first(facts.steps, "loss")
    if not recent or start is None:
        return None
    mean = fmean(recent)
    return {"first": start, "last": mean} if abs(mean - start) <= limits["fall"] * abs(start) else None


def _recent_losses(facts: RunFacts) -> list[float]:
    """Return the training losses of the last quarter of the steps."""
    return [loss for step, loss in values(facts.steps, "loss") if step > 0.75 * facts.total_steps]


def _beta_and_change(facts: RunFacts) -> dict[str, float] | None:
    """Return beta, first and last training loss, and the last margin in nats; None if one is unknown."""
    beta, margin = facts.setting("loss.beta"), facts.moved(MARGIN)
    start, end = first(facts.steps, "loss"), last(facts.steps, "loss")
    if not beta or margin is None or start is None or end is None:
        return None
    return {"beta": beta, "first": start, "last": end, "margin": margin / beta}


def _learnt_nothing(facts: RunFacts, limits: Limits) -> Fields | None:
    if not facts.has_ended(limits["steps"]):
        return None
    symptoms = [*_accuracy_of_chance(facts, limits), *_loss_at_its_start(facts, limits)]
    return {"symptom": "; ".join(symptoms)} if symptoms else None


def _accuracy_of_chance(facts: RunFacts, limits: Limits) -> Iterator[str]:
    accuracy, training = facts.accuracy(), facts.training_accuracy()
    if accuracy is None or accuracy.pairs < limits["pairs"]:
        return
    noise = limits["standard_errors"] * accuracy.noise
    both = [accuracy.value, *([] if training is None else [training.value])]
    if abs(accuracy.value - 0.5) > noise or max(both) >= limits["accuracy"]:
        return
    yield (
        f"{facts.part} accuracy {accuracy.value:.2f} on {accuracy.pairs:,} pairs is within its noise of one "
        f"half ({noise:.2f}); margin {last(facts.last_rows, MARGIN) or 0.0:.2g}, training accuracy "
        f"{number(None if training is None else training.value)}"
    )


def _prefers_rejected(facts: RunFacts, limits: Limits) -> Fields | None:
    accuracy = facts.training_accuracy()
    if accuracy is None:
        return None
    if accuracy.value >= min(limits["accuracy"], 0.5 - limits["standard_errors"] * accuracy.noise):
        return None
    return {"accuracy": accuracy.value, "pairs": accuracy.pairs}


def _loss_at_its_start(facts: RunFacts, limits: Limits) -> Iterator[str]:
    losses, change = _loss_that_stayed(facts, limits), _beta_and_change(facts)
    if losses is None or len(values(facts.steps, "loss")) < limits["rows"]:
        return
    if change is not None and change["margin"] >= limits["margin"]:
        return  # a loss with a large constant part, such as sppo_hard with a small beta
    yield (
        f"the training loss stayed at its start, {losses['first']:.4g} -> {losses['last']:.4g}, in "
        f"{facts.total_steps:,} steps with optim.lr={number(facts.setting('optim.lr'))}"
    )


def _does_not_generalise(facts: RunFacts, limits: Limits) -> Fields | None:
    if facts.total_steps < limits["steps"]:
        return None
    symptoms = [*_rise_of_evaluation_loss(facts, limits), *_gap_of_accuracy(facts, limits)]
    return {"symptom": "; ".join(symptoms)} if symptoms else None


def _rise_of_evaluation_loss(facts: RunFacts, limits: Limits) -> Iterator[str]:
    losses = values(facts.evaluations, "loss")
    start = known_start(facts)
    before_steps = [row for row in evaluation_rows(facts.rows) if row["step"] == 0]
    losses = [*(values(before_steps, "loss") if start is None else [(0.0, start)]), *losses]
    after = fmean(recent) if (recent := _recent_losses(facts)) else None
    if len(losses) < 2 or after is None:
        return
    step, lowest = min(losses[:-1], key=lambda one: one[1])
    # Before the first step the loss of the training pairs is that of a policy that is the reference, too.
    earlier = [loss for at, loss in values(facts.steps, "loss") if at <= step]
    before = earlier[-1] if earlier else lowest
    end, pairs = losses[-1][1], facts.evaluated_pairs
    noise = limits["standard_errors"] * abs(end) / math.sqrt(pairs) if pairs else math.inf
    if after < before and end - lowest > max(limits["rise"] * abs(losses[0][1]), noise):
        since = f"at step {step:.0f}" if step else "at the start"
        yield (
            f"evaluation loss rose from {lowest:.3g} {since} to {end:.3g}, while training loss fell from "
            f"{before:.3g} to {after:.3g}"
        )


def _gap_of_accuracy(facts: RunFacts, limits: Limits) -> Iterator[str]:
    training, accuracy = facts.training_accuracy(), facts.accuracy()
    if not facts.evaluations or training is None or accuracy is None:
        return
    noise = limits["standard_errors"] * math.hypot(training.noise, accuracy.noise)
    if training.value - accuracy.value > max(limits["difference"], noise):
        yield (
            f"training accuracy {training.value:.2f} is far above evaluation accuracy {accuracy.value:.2f} "
            f"on {counted(accuracy.pairs, 'pair')}"
        )


def _displacement(facts: RunFacts, limits: Limits) -> Fields | None:
    share, chosen = last(facts.last_rows, "rewards/both_fall"), facts.moved_logps("chosen")
    if share is None or chosen is None or facts.setting("loss.kind") in _LOWERS_CHOSEN:
        return None
    if share < limits["both_fall"] or chosen.start - chosen.end < limits["fall"]:
        return None
    return {"first": chosen.start, "last": chosen.end, "share": percent(share)}


TRAINING_CHECKS: dict[str, Check] = {
    "diverged": _diverged,
    "collapsed": find_collapse,
    "learning_rate_too_high": _learning_rate_too_high,
    "far_from_reference": _far_from_reference,
    "beta_too_large": _beta_too_large,
    "beta_too_small": _beta_too_small,
    "prefers_rejected": _prefers_rejected,
    "learnt_nothing": _learnt_nothing,
    "does_not_generalise": _does_not_generalise,
    "displacement": _displacement,
    "bad_steps": find_bad_steps,
}
"""By rule."""


NOTHING_TO_JUDGE = "nothing to judge, as no metrics row of a training step was written (trainer.log_every)"


def sentence_of_success(facts: RunFacts) -> str:
    """Return the verdict of a run without a finding."""
    accuracy = facts.accuracy()
    start, end = first(facts.steps, "loss"), last(facts.steps, "loss")
    if start is None or end is None:
        return NOTHING_TO_JUDGE
    fall = f"training loss {start:.3g} -> {end:.3g} in {counted(facts.total_steps, 'step')}"
    found = "no fault found" if facts.total_steps >= FEWEST_STEPS else "too short to be judged"
    if accuracy is None or last(facts.last_rows, ACCURACY) is None:
        return f"{found}: {fall}"
    pairs = f" on {counted(accuracy.pairs, 'pair')}" if accuracy.pairs else ""
    margin = number(last(facts.last_rows, MARGIN))
    learnt = f"{facts.part} accuracy {accuracy.value:.2f}{pairs}, margin {margin}, {fall}"
    if not facts.evaluations:
        found += " (nothing was evaluated after a step: data.eval)"
    return f"{found}: {learnt}"
