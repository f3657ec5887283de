"""Results of a comparison, read from `comparison.json`."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.text import number, percent, without_secrets
from dpo_dist.insight.pages.render import inert_html, table

SHARES = ("finished", "refusals", "lists", "markdown", "distinct_3", "longest_repeat", "empty")
"""Metrics of style that are shares; the others are numbers."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % interval; without one both ends are None."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def negative(self) -> "Estimate":
        """The difference in the other order."""
        if self.low is None or self.high is None:
            return Estimate(-self.value)
        return Estimate(-self.value, -self.high, -self.low)

    @property
    def complement(self) -> "Estimate":
        """One minus the estimate: the win rate of the other model."""
        if self.low is None or self.high is None:
            return Estimate(1 - self.value)
        return Estimate(1 - self.value, 1 - self.high, 1 - self.low)

    def is_above(self, value: float) -> bool:
        """Return whether the interval is above a value; False without an interval."""
        return self.low is not None and self.low > value

    def is_below(self, value: float) -> bool:
        """Return whether the interval is below a value; False without an interval."""
        return self.high is not None and self.high < value


@dataclass(frozen=True)
class Model:
    """A model that was compared.

    Attributes:
        name, path: as given.
        kl: to the base, in nats per response; None for other token ids. Of the base 0.
        score: of the judge; None without one that grades.
        win_rate: over the base; None without a judge, and of the base.
        style: of its responses, by metric.
    """

    name: str
    path: str
    kl: Estimate | None
    score: Estimate | None
    win_rate: Estimate | None
    style: Mapping[str, Estimate]

    def estimate(self, metric: str) -> Estimate | None:
        """Return a mean by its name in `comparison.json`."""
        own = {"kl": self.kl, "score": self.score}
        return own[metric] if metric in own else self.style.get(metric)


@dataclass(frozen=True)
class Results:
    """A comparison.

    Attributes:
        base: name of the first model.
        prompts: number of prompts.
        judge: in words; None without one.
        compares: whether the judge compares two responses, in both positions, and gives no scores.
        models: the base first.
        rates: win rate of the first model over the second one, in both orders.
        differences: of the second model minus the first one, by metric, in both orders; empty in files of
            versions before them.
        notes: other numbers of the comparison, by name.
        temperature: of sampling; None if it is not known.
    """

    base: str
    prompts: int
    judge: str | None
    compares: bool
    models: tuple[Model, ...]
    rates: Mapping[tuple[str, str], Estimate]
    differences: Mapping[tuple[str, str], Mapping[str, Estimate]]
    notes: Mapping[str, int]
    temperature: float | None

    @property
    def has_scores(self) -> bool:
        """Whether the judge gave scores."""
        return any(model.score for model in self.models)

    def quality(self, model: Model) -> Estimate | None:
        """Return the score of a model, or without scores its win rate over the base: of the base one half."""
        if self.has_scores:
            return model.score
        if model.name == self.base:
            return Estimate(0.5) if self.rates else None
        return model.win_rate

    def difference(self, first: Model, second: Model, metric: str) -> Estimate | None:
        """Return the second model's mean minus the first one's; None if it is not known.

        Without a paired interval it has that of two independent means, which is wider: the ends of one minus
        the opposite ends of the other.
        """
        found = self.differences.get((first.name, second.name), {}).get(metric)
        one, other = self._mean(first, metric), self._mean(second, metric)
        if found is not None or one is None or other is None:
            return found
        difference = other.value - one.value
        if one.low is None or one.high is None or other.low is None or other.high is None:
            return Estimate(difference)
        return Estimate(difference, other.low - one.high, other.high - one.low)

    def _mean(self, model: Model, metric: str) -> Estimate | None:
        is_zero = metric == "kl" and model.name == self.base
        return Estimate(0.0, 0.0, 0.0) if is_zero else model.estimate(metric)

    def has_less_kl(self, model: Model, other: Model) -> bool:
        """Return whether the interval of the difference of KL shows that a model has less than another."""
        found = self.difference(model, other, "kl")
        return found is not None and found.is_above(0)

    def is_better(self, model: Model, other: Model) -> bool:
        """Return whether the interval of the score, or without scores of the win rate, is above another's."""
        if self.has_scores:
            found = self.difference(other, model, "score")
            return found is not None and found.is_above(0)
        rate = self.rates.get((model.name, other.name))
        return rate is not None and rate.is_above(0.5)

    def frontier(self) -> list[Model]:
        """Return the models that none exceeds in quality with at most their KL, by KL (Pareto)."""
        placed = [(model, model.kl.value, quality.value) for model, quality in self._placed() if model.kl]
        best = [
            (kl, model)
            for model, kl, quality in placed
            if not any(
                (other_kl <= kl and other > quality) or (other_kl < kl and other == quality)
                for _, other_kl, other in placed
            )
        ]
        return [model for _, model in sorted(best, key=lambda each: each[0])]

    def placed(self) -> list[Model]:
        """Return the models with a KL and a quality."""
        return [model for model, _ in self._placed() if model.kl]

    def _placed(self) -> list[tuple[Model, Estimate]]:
        return [(model, quality) for model in self.models if (quality := self.quality(model))]


def read_results(file: Path) -> Results:
    """Read a `comparison.json`.

    Raises:
        DataError: it cannot be read or is not of a comparison.
    """
    try:
        return _results(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            "the results of the comparison cannot be read",
            where=str(file),
            got=f"{type(error).__name__}: {error}",
            remedy="run dpo_dist.compare again: finished parts are not repeated",
        ) from error


def _results(fields: Mapping[str, Any]) -> Results:
    base = str(fields["base"])
    rates: dict[tuple[str, str], Estimate] = {}
    for win in fields.get("wins") or ():
        rate = _estimate(win["rate"], win.get("interval"))
        if rate is not None:
            rates[str(win["first"]), str(win["second"])] = rate
            rates[str(win["second"]), str(win["first"])] = rate.complement
    models = [_model(each, base) for each in fields["models"]]
    judge = fields.get("judge")
    return Results(
        base=base,
        prompts=int(fields["prompts"]),
        judge=None if judge is None else str(without_secrets(str(judge))),
        compares=bool(fields.get("judge_compares")),
        models=tuple(replace(model, win_rate=rates.get((model.name, base))) for model in models),
        rates=rates,
        differences=dict(_differences(fields.get("differences") or ())),
        notes={str(name): int(number) for name, number in (fields.get("counts") or {}).items()},
        temperature=finite((fields.get("sampling") or {}).get("temperature")),
    )


def _differences(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str], dict[str, Estimate]]]:
    for row in rows:
        first, second = str(row["first"]), str(row["second"])
        of_second = {
            metric: found
            for metric, value in row.items()
            if (found := _estimate(value, row.get(f"{metric}_interval"))) is not None
        }
        yield (first, second), of_second
        yield (second, first), {metric: found.negative for metric, found in of_second.items()}


def _model(fields: Mapping[str, Any], base: str) -> Model:
    name = str(fields["name"])
    intervals = fields.get("style_intervals") or {}
    style = {
        str(metric): found
        for metric, value in (fields.get("style") or {}).items()
        if (found := _estimate(value, intervals.get(metric))) is not None
    }
    kl = Estimate(0.0) if name == base else _estimate(fields.get("kl"), fields.get("kl_interval"))
    score = _estimate(fields.get("score"), fields.get("score_interval"))
    path = str(without_secrets(str(fields.get("path", ""))))
    return Model(name, path, kl, score, None, style)


def _estimate(value: object, interval: object) -> Estimate | None:
    """Return an estimate; None if its value is no finite number."""
    mean = finite(value)
    if mean is None:
        return None
    ends = [finite(end) for end in interval] if isinstance(interval, list) else []
    return Estimate(mean, *ends) if len(ends) == 2 and None not in ends else Estimate(mean)


def finite(value: object) -> float | None:
    """Return a number of a JSON file; None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def response_of(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a model's response in a row of `answers.jsonl`; empty if it is damaged."""
    found = row["responses"].get(name)
    return found if isinstance(found, dict) else {}


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


MOST_IN_MATRIX = 20
_MOST_PAIRS = 15

_STYLE_TITLES = {
    "length": "tokens",
    "words": "words",
    "finished": "ended",
    "refusals": "refusals",
    "lists": "lists",
    "markdown": "Markdown",
    "distinct_3": "distinct 3-grams",
    "longest_repeat": "longest repeat",
    "empty": "empty",
}

_DIFFERENCE_TITLES = {
    "score": "score",
    "kl": "KL, nats per response",
    "length": "tokens",
    "finished": "ended",
    "refusals": "refusals",
    "empty": "empty",
}

TABLES_STYLE = """
.models th, .models td { width: auto; white-space: nowrap; overflow-wrap: normal; text-align: right; }
.models th:first-child, .models td:first-child { text-align: left; white-space: normal; }
.models td:first-child { min-width: 130px; overflow-wrap: anywhere; }
.models small { display: block; color: var(--quiet); font-size: 12px; }
.models .better, .models .worse, .models .clear
{ display: inline-block; border-radius: 4px; padding: 1px 6px; }
.models .better { background: var(--better); }
.models .worse { background: var(--worse); }
.models .clear { background: var(--tile); font-weight: 600; }
.models .diagonal { color: var(--quiet); }
"""


def models_table(results: Results) -> str:
    """Return a table of the models: KL, score, win rate over the base, place on the frontier."""
    frontier = results.frontier() if len(results.placed()) > 1 else []
    columns = {
        "KL, nats per response": any(model.kl for model in results.models[1:]),
        "score": results.has_scores,
        f"win rate over {results.base}": any(model.win_rate for model in results.models),
        "frontier": bool(frontier),
    }
    rows = []
    for model in results.models:
        cells = (
            _estimate_cell(model.kl, is_share=False),
            _estimate_cell(model.score, is_share=False),
            "base" if model.name == results.base else _estimate_cell(model.win_rate, is_share=True),
            "yes" if model in frontier else "",
        )
        shown = [cell for cell, is_shown in zip(cells, columns.values(), strict=True) if is_shown]
        rows.append([_name(model), *shown])
    return table(["model", *(title for title, is_shown in columns.items() if is_shown)], rows, "models")


def style_table(results: Results) -> str:
    """Return a table of the style of the models' responses; empty without any."""
    known = {metric for model in results.models for metric in model.style}
    metrics = [metric for metric in _STYLE_TITLES if metric in known]
    metrics += sorted(known - set(_STYLE_TITLES))
    rows = [
        [inert_html(model.name), *(_style_cell(model, results.models[0], metric) for metric in metrics)]
        for model in results.models
    ]
    return (
        table(["model", *(_STYLE_TITLES.get(metric, metric) for metric in metrics)], rows, "models")
        if metrics
        else ""
    )


def differences_table(results: Results) -> str:
    """Return a table of the differences of every two models, of many those from the base; or nothing."""
    pairs = [
        (first, second)
        for first, second in itertools.combinations(results.models, 2)
        if (first.name, second.name) in results.differences
    ]
    shown = pairs if len(pairs) <= _MOST_PAIRS else [pair for pair in pairs if pair[0] is results.models[0]]
    known = {metric for pair in shown for metric in _differences_of(results, pair)}
    metrics = [metric for metric in _DIFFERENCE_TITLES if metric in known]
    rows = [
        [
            f"{inert_html(second.name)}<small>minus {inert_html(first.name)}</small>",
            *(
                _difference_cell(_differences_of(results, (first, second)).get(metric), metric)
                for metric in metrics
            ),
        ]
        for first, second in shown
    ]
    if not rows:
        return ""
    omitted = "" if shown == pairs else " Those between the other models are in comparison.json."
    return (
        f"{table(['model', *(_DIFFERENCE_TITLES[metric] for metric in metrics)], rows, 'models')}"
        "<p>Means over the prompts where both models have a value, with 95 % intervals over prompts; shares "
        f"in points. Marked cells: 0 is outside the interval.{omitted}</p>"
    )


def _differences_of(results: Results, pair: tuple[Model, Model]) -> Mapping[str, Estimate]:
    return results.differences.get((pair[0].name, pair[1].name), {})


def _difference_cell(found: Estimate | None, metric: str) -> str:
    if found is None:
        return ""
    scale = 100 if metric in SHARES else 1
    value, ends = _signed(scale * found.value), ""
    if found.low is not None and found.high is not None:
        ends = f"<small>[{_signed(scale * found.low)}, {_signed(scale * found.high)}]</small>"
    kind = "clear" if found.is_above(0) or found.is_below(0) else "open"
    return f'<span class="{kind}">{value}{ends}</span>'


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def win_matrix(results: Results) -> str:
    """Return the win rate of the model of each row over that of each column; empty without a judge."""
    models = results.models[:MOST_IN_MATRIX]
    if not results.rates:
        return ""
    rows = [
        [inert_html(first.name), *(_matrix_cell(results, first, second) for second in models)]
        for first in models
    ]
    omitted = len(results.models) - len(models)
    note = f" Only the first {len(models)} models are in this table." if omitted else ""
    return (
        f"{table(['wins of', *(model.name for model in models)], rows, 'models')}"
        "<p>Share of prompts that the model of the row wins over that of the column, with 95 % intervals "
        f"over prompts; a tie is half a win. Coloured cells: 50 % is outside the interval.{note}</p>"
    )


def _matrix_cell(results: Results, first: Model, second: Model) -> str:
    if first is second:
        return '<span class="diagonal">\u2013</span>'
    rate = results.rates.get((first.name, second.name))
    if rate is None:
        return ""
    kind = "better" if rate.is_above(0.5) else "worse" if rate.is_below(0.5) else "open"
    return f'<span class="{kind}">{_estimate_cell(rate, is_share=True)}</span>'


def _name(model: Model) -> str:
    return f"{inert_html(model.name)}<small>{inert_html(model.path)}</small>"


def _style_cell(model: Model, base: Model, metric: str) -> str:
    own, other = model.style.get(metric), base.style.get(metric)
    cell = _estimate_cell(own, is_share=metric in SHARES)
    if metric in SHARES or model is base or own is None or other is None or other.value <= 0:
        return cell
    return f"{cell}<small>{own.value / other.value:.2f} times</small>"


def _estimate_cell(estimate: Estimate | None, *, is_share: bool) -> str:
    """Return a value with its interval below it."""
    if estimate is None:
        return ""
    if is_share:
        value, _, ends = rate_text(estimate).partition(" [")
        return f"{value}<small>[{ends}</small>" if ends else value
    ends = (
        ""
        if estimate.low is None or estimate.high is None
        else f"{number(estimate.low)}, {number(estimate.high)}"
    )
    return f"{number(estimate.value)}<small>[{ends}]</small>" if ends else number(estimate.value)
