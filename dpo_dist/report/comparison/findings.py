"""Sentences about a comparison: the best model, cheaper ones, those to avoid, changes of style."""

import math
from collections.abc import Iterator, Sequence

from dpo_dist.number_text import number, percent
from dpo_dist.report.comparison.results import Estimate, Model, Results

LONGER = 1.5
"""Length of a model's responses over that of the base, from which a finding warns; also its inverse."""
SHARE = 0.05
"""Change of a share of responses from which a finding warns."""
CUT_OFF = 0.5
"""Share of the base's responses that do not end, from which a finding warns."""

_FAULTS = {
    "finished": (True, "do not end"),
    "refusals": (False, "are refusals"),
    "empty": (False, "are empty"),
}
"""By metric of style: whether responses without it have the fault, and the fault."""
_MOST_WARNINGS, _MOST_NAMES = 5, 4


def headline(results: Results) -> str:
    """Return the result of a comparison in a few sentences, plain text.

    Only means are compared without their intervals, and called so: "the highest score". Every other claim has
    an interval of the difference, over the same prompts, on its side. A model of which no response ends is
    not called the best: the judge saw beginnings of its responses only.
    """
    unended = [model for model in results.models if results.quality(model) and not _ends(model)]
    if unended and not _ranked(results):
        return "No response of any model ends within compare.max_new_tokens: no model is called the best."
    not_ranked = [f"Not ranked, as no response ends: {_names(unended)}."] if unended else []
    return " ".join([*not_ranked, _of_ranked(results)])


def _of_ranked(results: Results) -> str:
    ranked = _ranked(results)
    if not ranked:
        return _without_judge(results)
    tops = [model for model in ranked if _value(results, model) == _value(results, ranked[0])]
    base = next((model for model in tops if model.name == results.base), None)
    if base is not None:
        return " ".join([_base_first(results, base, tops), *_winners(results)])
    claim = f"{_names(tops)} {'has' if len(tops) == 1 else 'have'} {_highest(results, tops)}"
    rated = [model for model in tops if model.win_rate]
    if not rated:
        return f"{claim}."
    rates = f"{_possessive(tops)} over {results.base} {_rates(rated)}"
    if any(model.win_rate and model.win_rate.is_above(0.5) for model in rated):
        return " ".join(_as_good(results, ranked, tops, f"{claim}; {rates}."))
    if all(model.win_rate and model.win_rate.low is None for model in rated):
        return f"{claim}; {rates}, without an interval."
    chance = all(model.win_rate and not model.win_rate.is_below(0.5) for model in rated)
    doubt = f"{claim}, but {rates}{', which chance explains' if chance else ''}."
    winners = list(_winners(results))
    if winners:
        return " ".join([doubt, *winners])
    more = " More prompts (compare.prompts) make intervals smaller." if chance else ""
    return f"No model is clearly better than {results.base}: {doubt}{more}"


def warnings(results: Results) -> list[str]:
    """Return sentences about models to look at more closely, plain text; at most five."""
    found = [*_dominated(results), *_worse(results)]
    base = next((model for model in results.models if model.name == results.base), None)
    if base is not None:
        found += _cut_off(base)
        found += [
            text for model in results.models if model is not base for text in _style(results, model, base)
        ]
    return found[:_MOST_WARNINGS]


def rate_text(rate: Estimate) -> str:
    """Return "62 % [55, 69]"."""
    ends = "" if rate.low is None or rate.high is None else f" [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
    return f"{percent(rate.value)}{ends}"


def _ranked(results: Results) -> list[Model]:
    """Return the models with a quality and an end, the best first, of equal ones the one of less KL."""
    placed = [
        (model, quality) for model in results.models if (quality := results.quality(model)) and _ends(model)
    ]
    order = sorted(placed, key=lambda each: (-each[1].value, each[0].kl.value if each[0].kl else 0.0))
    return [model for model, _ in order]


def _ends(model: Model) -> bool:
    return "finished" not in model.style or model.style["finished"].value > 0


def _value(results: Results, model: Model) -> float | None:
    quality = results.quality(model)
    return None if quality is None else quality.value


def _highest(results: Results, tops: Sequence[Model]) -> str:
    """Return "the highest score, 0.62 at a KL of 14 nats"; of several the same score and no KL."""
    best, same = tops[0], "the same highest" if len(tops) > 1 else "the highest"
    if not results.has_scores:
        measure = f"{same} win rate over {results.base}"
    else:
        measure = f"{same} score" + (f", {number(best.score.value)}" if best.score else "")
    return (
        measure if len(tops) > 1 or best.kl is None else f"{measure} at a KL of {number(best.kl.value)} nats"
    )


def _possessive(tops: Sequence[Model]) -> str:
    return "its win rate" if len(tops) == 1 else "their win rates"


def _rates(rated: Sequence[Model]) -> str:
    texts = [rate_text(model.win_rate) for model in rated if model.win_rate]
    if len(set(texts)) == 1:
        return f"{'is' if len(texts) == 1 else 'are all'} {texts[0]}"
    return f"are {_listed(texts)}"


def _base_first(results: Results, base: Model, tops: Sequence[Model]) -> str:
    others = [model for model in tops if model is not base]
    if not others:
        return f"No model does better than {base.name} on average."
    return f"{_names([*others, base])} have {_highest(results, tops)}."


def _as_good(results: Results, ranked: Sequence[Model], tops: Sequence[Model], claim: str) -> Iterator[str]:
    """Yield the claim about the best model and those that may be as good, first one of clearly less KL."""
    best = tops[0]
    it = "it" if len(tops) == 1 else best.name
    open_ones = {
        model.name: rate
        for model in ranked
        if model.name != results.base and model not in tops
        if (rate := results.rates.get((model.name, best.name))) is not None and _is_open(rate)
    }
    near = [
        model
        for model in ranked
        if model.name in open_ones
        and results.has_less_kl(model, best)
        and model.win_rate
        and model.win_rate.is_above(0.5)
    ]
    if near:
        nearest = min(near, key=lambda model: model.kl.value if model.kl else 0.0)
        of_nearest = rate_text(open_ones.pop(nearest.name))
        yield (
            f"{nearest.name} cannot be distinguished from the best (win rate {of_nearest} over {best.name}), "
            f"with {percent(_kl_share(nearest, best))} of its KL."
        )
    yield claim
    if len(tops) > 1 and all(results.has_less_kl(best, other) for other in tops[1:]):
        yield f"{best.name} has the least KL of them."
    for model in ranked:
        rate = results.rates.get((model.name, best.name))
        if rate is not None and rate.is_above(0.5) and model not in tops:
            yield f"But {model.name} wins over {it} on {rate_text(rate)} of the prompts."
    if open_ones:
        others = _listed(list(open_ones))
        yield f"{others} cannot be distinguished from {it}{' either' if near else ''}."


def _is_open(rate: Estimate) -> bool:
    return rate.low is not None and not rate.is_below(0.5) and not rate.is_above(0.5)


def _winners(results: Results) -> Iterator[str]:
    """Yield the models that win more prompts than they lose against the base."""
    for model in results.models:
        if _ends(model) and model.win_rate and model.win_rate.is_above(0.5):
            yield f"But {model.name} wins over {results.base} on {rate_text(model.win_rate)} of the prompts."


def _kl_share(model: Model, best: Model) -> float:
    return model.kl.value / best.kl.value if model.kl and best.kl else math.nan


def _without_judge(results: Results) -> str:
    text = "Without a judge the models can be compared by KL and style only."
    moved = [model for model in results.models if model.kl and model.name != results.base]
    if not moved:
        return text
    moved.sort(key=lambda model: -(model.kl.value if model.kl else 0.0))
    far = [model for model in moved if not results.has_less_kl(model, moved[0])]
    kl = _listed([number(model.kl.value) for model in far if model.kl])
    if len(far) == 1:
        return f"{text} {far[0].name} is farthest from {results.base}: {kl} nats per response."
    return (
        f"{text} {_names(far)} are farthest from {results.base}: {kl} nats per response, a difference that "
        "chance explains."
    )


def _names(models: Sequence[Model]) -> str:
    return _listed([model.name for model in models])


def _listed(texts: Sequence[str]) -> str:
    """Return "a, b and c"; of more than four the first three and the number of the others."""
    shown = (
        list(texts) if len(texts) <= _MOST_NAMES else [*texts[: _MOST_NAMES - 1], f"{len(texts) - 3} others"]
    )
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _dominated(results: Results) -> Iterator[str]:
    """Yield the models that another one exceeds with less KL, both by the intervals of the differences."""
    measure = "score" if results.has_scores else "win rate"
    for model in results.placed():
        if model.name == results.base:
            continue
        better = [
            other
            for other in results.placed()
            if _ends(other) and results.is_better(other, model) and results.has_less_kl(other, model)
        ]
        if better:
            best = max(better, key=lambda other: _value(results, other) or 0.0)
            yield f"{model.name} has a lower {measure} than {best.name} and more KL."


def _worse(results: Results) -> Iterator[str]:
    for model in results.models:
        if model.win_rate and model.win_rate.is_below(0.5):
            yield f"{model.name} is worse than {results.base}: win rate {rate_text(model.win_rate)}."


def _style(results: Results, model: Model, base: Model) -> Iterator[str]:
    length, before = model.style.get("length"), base.style.get("length")
    if length and before and before.value > 0 and length.value > 0 and _differs(results, model, "length"):
        ratio = length.value / before.value
        if ratio >= LONGER:
            yield (
                f"{model.name}: responses are {ratio:.1f} times as long as those of {base.name}; many judges "
                "prefer length."
            )
        elif ratio <= 1 / LONGER:
            yield f"{model.name}: responses have {percent(ratio)} of the length of those of {base.name}."
    for metric, (is_lack, text) in _FAULTS.items():
        share, other = _share(model, metric, is_lack), _share(base, metric, is_lack)
        if share is None or other is None or share - other < SHARE or not _differs(results, model, metric):
            continue
        yield f"{model.name}: {percent(share)} of responses {text} ({base.name}: {percent(other)})."


def _differs(results: Results, model: Model, metric: str) -> bool:
    """Return whether the interval of the difference from the base excludes 0; True without an interval.

    Of five prompts or fewer nothing has an interval, and a finding is no claim about other prompts.
    """
    found = results.difference(results.models[0], model, metric)
    return found is None or found.low is None or found.is_above(0) or found.is_below(0)


def _cut_off(base: Model) -> Iterator[str]:
    share = _share(base, "finished", is_lack=True)
    if share is not None and share >= CUT_OFF:
        yield (
            f"{percent(share)} of the responses of {base.name} do not end within compare.max_new_tokens: "
            "the models are compared by beginnings of responses."
        )


def _share(model: Model, metric: str, is_lack: bool) -> float | None:
    """Return a share of the responses, or of those that lack it."""
    found = model.style.get(metric)
    return None if found is None else 1 - found.value if is_lack else found.value
