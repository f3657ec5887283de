"""Sentences about a comparison: the best model, cheaper ones, those to avoid, changes of style."""

import math
from collections.abc import Iterator

from dpo_dist.number_text import number, percent
from dpo_dist.report.comparison.results import Estimate, Model, Results

LONGER = 1.5
"""Length of a model's responses over that of the base, from which a finding warns; also its inverse."""
SHARE = 0.05
"""Change of a share of responses from which a finding warns."""
CUT_OFF = 0.5
"""Share of the base's responses that do not end, from which a finding warns."""

_FAULTS = {
    "unfinished": "do not end",
    "refusals": "are refusals",
    "empty": "are empty",
}
_MOST_WARNINGS = 5


def headline(results: Results) -> str:
    """Return the result of a comparison in one or two sentences, plain text."""
    ranked = _ranked(results)
    if not ranked:
        return _without_judge(results)
    best = ranked[0]
    if best.name == results.base:
        return " ".join([f"No model does better than {results.base} on average.", *_winners(results)])
    measure = _measure(results, best)
    over_base = best.win_rate
    if over_base is None:
        return f"{best.name} has the highest {measure}{_at_kl(best)}."
    rate = f"its win rate over {results.base} is {rate_text(over_base)}"
    highest = f"{best.name} has the highest {measure}{_at_kl(best)}; {rate}"
    if over_base.is_above(0.5):
        return " ".join([f"{highest}.", *_cheaper(results, ranked)])
    if over_base.low is None:
        return f"{highest}, without an interval."
    return (
        f"No model is clearly better than {results.base}: {best.name} has the highest {measure}, but {rate}, "
        "which chance explains. More prompts (compare.prompts) make intervals smaller."
    )


def warnings(results: Results) -> list[str]:
    """Return sentences about models to look at more closely, plain text; at most five."""
    found = [*_dominated(results), *_worse(results)]
    base = next((model for model in results.models if model.name == results.base), None)
    if base is not None:
        found += _cut_off(base)
        found += [text for model in results.models if model is not base for text in _style(model, base)]
    return found[:_MOST_WARNINGS]


def rate_text(rate: Estimate) -> str:
    """Return "62 % [55, 69]"."""
    ends = "" if rate.low is None or rate.high is None else f" [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
    return f"{percent(rate.value)}{ends}"


def _ranked(results: Results) -> list[Model]:
    """Return the models with a quality, the best first, of equal ones the one of less KL."""
    placed = [(model, quality) for model in results.models if (quality := results.quality(model))]
    order = sorted(placed, key=lambda each: (-each[1].value, each[0].kl.value if each[0].kl else 0.0))
    return [model for model, _ in order]


def _measure(results: Results, best: Model) -> str:
    if not results.has_scores:
        return f"win rate over {results.base}"
    return f"score, {number(best.score.value)}" if best.score else "score"


def _at_kl(model: Model) -> str:
    return f" at a KL of {number(model.kl.value)} nats" if model.kl else ""


def _cheaper(results: Results, ranked: list[Model]) -> Iterator[str]:
    """Yield the model of least KL that cannot be distinguished from the best one, if there is one."""
    best = ranked[0]
    candidates = []
    for model in ranked[1:]:
        rate = results.rates.get((model.name, best.name))
        is_open = rate is not None and rate.low is not None and not rate.is_below(0.5)
        if rate and is_open and model.name != results.base and _has_less_kl(model, best):
            candidates.append((_kl_share(model, best), model.name, rate))
    if candidates:
        share, name, rate = min(candidates, key=lambda each: each[:2])
        yield (
            f"{name} cannot be distinguished from it (win rate {rate_text(rate)}) with {percent(share)} "
            "of its KL."
        )


def _winners(results: Results) -> Iterator[str]:
    """Yield the models that win more prompts than they lose against a base of the highest mean."""
    for model in results.models:
        if model.win_rate and model.win_rate.is_above(0.5):
            yield f"But {model.name} wins over it on {rate_text(model.win_rate)} of the prompts."


def _has_less_kl(model: Model, best: Model) -> bool:
    return model.kl is not None and best.kl is not None and 0 <= model.kl.value < best.kl.value


def _kl_share(model: Model, best: Model) -> float:
    return model.kl.value / best.kl.value if model.kl and best.kl else math.nan


def _without_judge(results: Results) -> str:
    text = "Without a judge the models can be compared by KL and style only."
    moved = [(model.kl.value, model) for model in results.models if model.kl and model.name != results.base]
    if not moved:
        return text
    kl, model = max(moved, key=lambda each: each[0])
    return f"{text} {model.name} is farthest from {results.base}: {number(kl)} nats per response."


def _dominated(results: Results) -> Iterator[str]:
    placed, frontier = results.placed(), results.frontier()
    names = [model.name for model in placed if model not in frontier and model.name != results.base]
    if names:
        measure = "score" if results.has_scores else "win rate"
        subject = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}"
        yield f"{subject} a {measure} that another model reaches with less KL."


def _worse(results: Results) -> Iterator[str]:
    for model in results.models:
        if model.win_rate and model.win_rate.is_below(0.5):
            yield f"{model.name} is worse than {results.base}: win rate {rate_text(model.win_rate)}."


def _style(model: Model, base: Model) -> Iterator[str]:
    length, before = model.style.get("length"), base.style.get("length")
    if length and before and before.value > 0 and length.value > 0:
        ratio = length.value / before.value
        if ratio >= LONGER:
            yield (
                f"{model.name}: responses are {ratio:.1f} times as long as those of {base.name}; many judges "
                "prefer length."
            )
        elif ratio <= 1 / LONGER:
            yield f"{model.name}: responses have {percent(ratio)} of the length of those of {base.name}."
    for fault, text in _FAULTS.items():
        share, other = _share(model, fault), _share(base, fault)
        if share is not None and other is not None and share - other >= SHARE:
            yield f"{model.name}: {percent(share)} of responses {text} ({base.name}: {percent(other)})."


def _cut_off(base: Model) -> Iterator[str]:
    share = _share(base, "unfinished")
    if share is not None and share >= CUT_OFF:
        yield (
            f"{percent(share)} of the responses of {base.name} do not end within compare.max_new_tokens: "
            "the models are compared by beginnings of responses."
        )


def _share(model: Model, fault: str) -> float | None:
    if fault == "unfinished":
        finished = model.style.get("finished")
        return None if finished is None else 1 - finished.value
    found = model.style.get(fault)
    return None if found is None else found.value
