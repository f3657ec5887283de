"""Checks of a run's training: divergence, learning rate, beta, learning, over-fitting.

A check returns the fields of its rule's text, or None if the run does not break the rule or the rows lack the
metric.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean, median
from typing import Any, TypeAlias

from dpo_dist.diagnostics.run_facts import (
    ACCURACY,
    MARGIN,
    Row,
    RunFacts,
    evaluation_rows,
    first,
    last,
    number,
    values,
)
from dpo_dist.diagnostics.run_rate_symptoms import (
    LOGISTIC,
    falls_of_chosen,
    known_start,
    rise_of_loss,
    symptoms_of_rate,
)
from dpo_dist.diagnostics.run_rules import FEWEST_STEPS, RULES
from dpo_dist.diagnostics.run_step_faults import find_bad_steps, find_collapse
from dpo_dist.number_text import counted, percent

Fields: TypeAlias = Mapping[str, Any]
Limits: TypeAlias = Mapping[str, float]
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
