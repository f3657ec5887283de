"""Checks of the responses that the policy gives to held-out prompts: see `run_checks`."""

import math

from dpo_dist.diagnostics.run_checks import Check, Fields, Limits
from dpo_dist.diagnostics.run_facts import Row, RunFacts, first, last
from dpo_dist.number_text import percent

_SAMPLES = "samples/"
_REFERENCE = "samples/reference_"


def _over_optimised(facts: RunFacts, limits: Limits) -> Fields | None:
    symptoms = []
    start, end = _ends(facts, "length")
    wanted = last(facts.evaluations, "tokens/chosen") or 0.0
    if start and end and end / start >= _least_ratio(facts, limits) and end > wanted:
        symptoms.append(f"sampled responses are {end / start:.1f}x longer ({start:.0f} -> {end:.0f} tokens)")
    start, end = _ends(facts, "finished")
    if (
        start is not None
        and end is not None
        and 1 - end >= limits["unfinished"]
        and _is_enough(facts, 1 - start, 1 - end, limits["unfinished_rise"], limits)
    ):
        symptoms.append(f"{percent(1 - end)} of them do not end by themselves ({percent(1 - start)} before)")
    start, end = _ends(facts, "distinct_3")
    if start and end is not None and end / start <= limits["distinct_fall"]:
        symptoms.append(f"they repeat themselves (distinct 3-grams {percent(start)} -> {percent(end)})")
    return _sampled(facts, symptoms)


def _samples_degrade(facts: RunFacts, limits: Limits) -> Fields | None:
    symptoms = []
    for metric, meaning in (
        ("empty", "are empty"),
        ("refusals", "are refusals"),
        ("language_changed", "are in another language than the chosen response"),
    ):
        start, end = _ends(facts, metric)
        if start is None or end is None:
            continue
        if _is_enough(facts, start, end, limits["rise"], limits):
            symptoms.append(f"{percent(end)} of the sampled responses {meaning} ({percent(start)} before)")
    return _sampled(facts, symptoms)


def _ends(facts: RunFacts, name: str) -> tuple[float | None, float | None]:
    """Return a metric of the reference's responses, or else of the first samples, and of the last ones."""
    # The last ones: settings of samples may change when a run is resumed, and the reference responds again.
    start = last(facts.evaluations, _REFERENCE + name)
    if start is None:
        start = first(facts.evaluations, _SAMPLES + name)
    return start, last(facts.evaluations, _SAMPLES + name)


def _least_ratio(facts: RunFacts, limits: Limits) -> float:
    """Return the ratio of mean lengths that is no chance; without the number of prompts the limit."""
    prompts = last(facts.evaluations, "samples/prompts")
    if not prompts:
        return limits["length_ratio"]
    # Of two responses to one prompt, as of a model that has not changed.
    noise = limits["standard_errors"] * limits["length_spread"] * math.sqrt(2 / prompts)
    return max(limits["length_ratio"], math.exp(noise))


def _is_enough(facts: RunFacts, start: float, end: float, least: float, limits: Limits) -> bool:
    """Return whether a share rose by `least` and, if their number is known, by more than chance."""
    rise, prompts = end - start, last(facts.evaluations, "samples/prompts")
    if prompts is None or rise < least:
        return rise >= least
    noise = math.sqrt((start * (1 - start) + end * (1 - end)) / prompts)
    return round(rise * prompts) >= limits["responses"] and rise > limits["standard_errors"] * noise


def _sampled(facts: RunFacts, symptoms: list[str]) -> Fields | None:
    if not symptoms:
        return None
    row = next(row for row in facts.evaluations if _has_samples(row))
    is_known = any(key.startswith(_REFERENCE) for one in facts.evaluations for key in one)
    return {
        "symptoms": ", ".join(symptoms),
        "start": "the reference" if is_known else f"step {row['step']:.0f}",
    }


def _has_samples(row: Row) -> bool:
    return any(key.startswith(_SAMPLES) for key in row)


SAMPLE_CHECKS: dict[str, Check] = {
    "over_optimised": _over_optimised,
    "samples_degrade": _samples_degrade,
}
"""By rule."""
