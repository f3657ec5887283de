"""Tables of a comparison: quality and style of the models, win rates of every two."""

import itertools
from collections.abc import Mapping

from dpo_dist.number_text import number
from dpo_dist.report.blocks import table
from dpo_dist.report.comparison.findings import rate_text
from dpo_dist.report.comparison.results import SHARES, Estimate, Model, Results
from dpo_dist.report.inert import inert_html

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
            _estimate(model.kl, is_share=False),
            _estimate(model.score, is_share=False),
            "base" if model.name == results.base else _estimate(model.win_rate, is_share=True),
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
    known = {metric for pair in shown for metric in _differences(results, pair)}
    metrics = [metric for metric in _DIFFERENCE_TITLES if metric in known]
    rows = [
        [
            f"{inert_html(second.name)}<small>minus {inert_html(first.name)}</small>",
            *(
                _difference_cell(_differences(results, (first, second)).get(metric), metric)
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


def _differences(results: Results, pair: tuple[Model, Model]) -> Mapping[str, Estimate]:
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
    return f'<span class="{kind}">{_estimate(rate, is_share=True)}</span>'


def _name(model: Model) -> str:
    return f"{inert_html(model.name)}<small>{inert_html(model.path)}</small>"


def _style_cell(model: Model, base: Model, metric: str) -> str:
    own, other = model.style.get(metric), base.style.get(metric)
    cell = _estimate(own, is_share=metric in SHARES)
    if metric in SHARES or model is base or own is None or other is None or other.value <= 0:
        return cell
    return f"{cell}<small>{own.value / other.value:.2f} times</small>"


def _estimate(estimate: Estimate | None, *, is_share: bool) -> str:
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
