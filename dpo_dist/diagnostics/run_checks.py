"""Checks of a run's training: divergence, learning rate, beta, learning, over-fitting, sampled responses.

A check returns the fields of its rule's text, or None if the run does not break the rule or the rows lack the
metric.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, TypeAlias

from dpo_dist.diagnostics.run_facts import ACCURACY, MARGIN, Row, RunFacts, first, last, number, values

Fields: TypeAlias = Mapping[str, Any]
Limits: TypeAlias = Mapping[str, float]
Check: TypeAlias = Callable[[RunFacts, Limits], Fields | None]

_QUANTITIES = {
    "logps/chosen": "log-prob of chosen responses",
    "logps/rejected": "log-prob of rejected responses",
    "loss": "loss",
    "grad_norm": "gradient norm",
}
"""In the order in which a step computes them: the first one that is not finite is the cause."""
_LOGISTIC = ("sigmoid", "robust", "dpop", "odpo")
"""Losses that fall to 0 with a growing margin; others have another scale, or grow again."""
_FIRST_SPIKE = 5
"""Rows before which a gradient norm has no usual value."""


def _diverged(facts: RunFacts, limits: Limits) -> Fields | None:
    for index, row in enumerate(facts.rows):
        broken = [key for key in row if not math.isfinite(row[key])]
        if len(broken) < limits["values"]:
            continue
        keys = [key for key in (*_QUANTITIES, *broken) if key in broken or f"eval_{key}" in broken]
        before = [earlier for earlier in facts.rows[:index] if "loss" in earlier]
        return {
            "quantity": f"the {_QUANTITIES.get(keys[0], keys[0])}",
            "step": int(row["step"]),
            "loss": number(last(before, "loss")),
            "grad_norm": number(last(before, "grad_norm")),
            "rate": number(row.get("learning_rate", last(before, "learning_rate"))),
        }
    return None


def _learning_rate_too_high(facts: RunFacts, limits: Limits) -> Fields | None:
    symptom = next(_symptoms_of_rate(facts, limits), None)
    if symptom is None:
        return None
    return {"symptom": symptom, "rate": number(facts.setting("optim.lr"))}


def _symptoms_of_rate(facts: RunFacts, limits: Limits) -> Iterator[str]:
    losses = values(facts.steps, "loss")
    for step, loss in losses[1:]:
        if loss > limits["loss_rise"] * losses[0][1] > 0:
            yield f"the loss rose from {losses[0][1]:.3g} to {loss:.3g} at step {step:.0f}"
            break
    logps = values(facts.steps, "logps/chosen_per_token")
    for step, logp in logps:
        fall = logps[0][1] - logp
        if fall > limits["fall"] and step <= limits["steps_share"] * facts.total_steps:
            yield (
                f"the log-prob of chosen responses fell by {fall:.2g} nats per token by step {step:.0f} of "
                f"{facts.total_steps:,}"
            )
            break
    norms = values(facts.steps, "grad_norm")
    for index in range(_FIRST_SPIKE, len(norms)):
        step, norm = norms[index]
        usual = median(value for _, value in norms[:index])
        if norm > max(limits["spike"] * usual, norms[0][1]):
            yield f"the gradient norm jumped from {usual:.2g} to {norm:.2g} at step {step:.0f}"
            break


def _over_optimised(facts: RunFacts, limits: Limits) -> Fields | None:
    symptoms = []
    start, end = _ends(facts, "samples/length")
    if start and end and end / start >= limits["length_ratio"]:
        symptoms.append(f"sampled responses are {end / start:.1f}x longer ({start:.0f} -> {end:.0f} tokens)")
    start, end = _ends(facts, "samples/finished")
    if start is not None and end is not None:
        unfinished, rise = 1 - end, start - end
        if unfinished >= limits["unfinished"] and rise >= limits["unfinished_rise"]:
            symptoms.append(f"{unfinished:.0%} of them do not end by themselves ({1 - start:.0%} before)")
    start, end = _ends(facts, "samples/distinct_3")
    if start and end is not None and end / start <= limits["distinct_fall"]:
        symptoms.append(f"they repeat themselves (distinct 3-grams {start:.0%} -> {end:.0%})")
    return _sampled(facts, symptoms)


def _samples_degrade(facts: RunFacts, limits: Limits) -> Fields | None:
    symptoms = []
    for metric, meaning in (
        ("samples/empty", "are empty"),
        ("samples/refusals", "are refusals"),
        ("samples/language_changed", "are in another language than the prompt"),
    ):
        start, end = _ends(facts, metric)
        if start is not None and end is not None and end - start >= limits["rise"]:
            symptoms.append(f"{end:.0%} of the sampled responses {meaning} ({start:.0%} before)")
    return _sampled(facts, symptoms)


def _ends(facts: RunFacts, metric: str) -> tuple[float | None, float | None]:
    """Return the first and the last value of a metric of evaluations."""
    return first(facts.evaluations, metric), last(facts.evaluations, metric)


def _sampled(facts: RunFacts, symptoms: list[str]) -> Fields | None:
    if not symptoms:
        return None
    step = next(row["step"] for row in facts.evaluations if _has_samples(row))
    return {"symptoms": ", ".join(symptoms), "step": int(step)}


def _has_samples(row: Row) -> bool:
    return any(key.startswith("samples/") for key in row)


def _far_from_reference(facts: RunFacts, limits: Limits) -> Fields | None:
    kl = last(facts.last_rows, "kl/rejected")
    if kl is None or kl <= limits["kl"]:
        return None
    return {"kl": kl, "beta": number(facts.setting("loss.beta"))}


def _beta_too_large(facts: RunFacts, limits: Limits) -> Fields | None:
    found = _beta_and_change(facts)
    if found is None or facts.setting("loss.kind") not in _LOGISTIC or found["beta"] < limits["beta"]:
        return None
    start = max(found["first"], math.log(2))
    if found["last"] > limits["loss_share"] * start or found["margin"] > limits["margin"]:
        return None
    return {**found, "beta": number(found["beta"])}


def _beta_too_small(facts: RunFacts, limits: Limits) -> Fields | None:
    found = _beta_and_change(facts)
    if found is None or found["margin"] < limits["margin"]:
        return None
    if abs(found["first"] - found["last"]) > limits["fall"] * abs(found["first"]):
        return None
    return {**found, "beta": number(found["beta"])}


def _beta_and_change(facts: RunFacts) -> dict[str, float] | None:
    """Return beta, first and last training loss, and the last margin in nats; None if one is unknown."""
    beta, margin = facts.setting("loss.beta"), last(facts.last_rows, MARGIN)
    start, end = first(facts.steps, "loss"), last(facts.steps, "loss")
    if not beta or margin is None or start is None or end is None:
        return None
    return {"beta": beta, "first": start, "last": end, "margin": margin / beta}


def _learnt_nothing(facts: RunFacts, limits: Limits) -> Fields | None:
    accuracy = facts.accuracy()
    if accuracy is None or not accuracy.pairs:
        return None
    noise = limits["standard_errors"] * accuracy.noise
    if abs(accuracy.value - 0.5) > noise or accuracy.value >= limits["accuracy"]:
        return None
    training = facts.training_accuracy()
    return {
        "part": facts.part,
        "accuracy": accuracy.value,
        "pairs": accuracy.pairs,
        "noise": noise,
        "margin": last(facts.last_rows, MARGIN) or 0.0,
        "training": number(None if training is None else training.value),
    }


def _hardly_trained(facts: RunFacts, limits: Limits) -> Fields | None:
    losses = [loss for _, loss in values(facts.steps, "loss")]
    if len(losses) < limits["rows"] or abs(losses[-1] - losses[0]) > limits["fall"] * abs(losses[0]):
        return None
    rate = number(facts.setting("optim.lr"))
    return {"first": losses[0], "last": losses[-1], "steps": facts.total_steps, "rate": rate}


def _overfit(facts: RunFacts, limits: Limits) -> Fields | None:
    losses = values(facts.evaluations, "loss")
    if len(losses) < limits["evaluations"]:
        return None
    step, lowest = min(losses, key=lambda one: one[1])
    before = [loss for at, loss in values(facts.steps, "loss") if at <= step]
    after = last(facts.steps, "loss")
    risen = losses[-1][1] - lowest
    if not before or after is None or after >= before[-1] or risen <= limits["rise"] * abs(losses[0][1]):
        return None
    return {
        "lowest": lowest,
        "step": int(step),
        "last": losses[-1][1],
        "before": before[-1],
        "after": after,
    }


def _displacement(facts: RunFacts, limits: Limits) -> Fields | None:
    share = last(facts.last_rows, "rewards/both_fall")
    start, end = first(facts.steps, "logps/chosen_per_token"), last(facts.steps, "logps/chosen_per_token")
    if share is None or start is None or end is None:
        return None
    if share < limits["both_fall"] or start - end < limits["fall"]:
        return None
    return {"first": start, "last": end, "share": share}


TRAINING_CHECKS: dict[str, Check] = {
    "diverged": _diverged,
    "learning_rate_too_high": _learning_rate_too_high,
    "over_optimised": _over_optimised,
    "samples_degrade": _samples_degrade,
    "far_from_reference": _far_from_reference,
    "beta_too_large": _beta_too_large,
    "beta_too_small": _beta_too_small,
    "learnt_nothing": _learnt_nothing,
    "hardly_trained": _hardly_trained,
    "overfit": _overfit,
    "displacement": _displacement,
}
"""By rule."""


def sentence_of_success(facts: RunFacts) -> str:
    """Return the verdict of a run without a finding."""
    accuracy = facts.accuracy()
    start, end = first(facts.steps, "loss"), last(facts.steps, "loss")
    if start is None or end is None:
        return "no training step was logged"
    fall = f"training loss {start:.3g} -> {end:.3g} in {facts.total_steps:,} steps"
    if accuracy is None or last(facts.last_rows, ACCURACY) is None:
        return f"no fault found: {fall}"
    margin = number(last(facts.last_rows, MARGIN))
    learnt = (
        f"{facts.part} accuracy {accuracy.value:.2f} on {accuracy.pairs:,} pairs, margin {margin}, {fall}"
    )
    if not facts.evaluations:
        return f"no fault found, but nothing was evaluated (data.eval): {learnt}"
    return f"no fault found: {learnt}"
