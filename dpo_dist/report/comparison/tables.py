"""Tables of a comparison: quality and style of the models, win rates of every two."""

from dpo_dist.number_text import number
from dpo_dist.report.blocks import table
from dpo_dist.report.comparison.findings import rate_text
from dpo_dist.report.comparison.results import SHARES, Estimate, Model, Results
from dpo_dist.report.inert import inert_html

MOST_IN_MATRIX = 20

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

TABLES_STYLE = """
.models th, .models td { width: auto; white-space: nowrap; overflow-wrap: normal; text-align: right; }
.models th:first-child, .models td:first-child { text-align: left; white-space: normal; }
.models td:first-child { min-width: 130px; overflow-wrap: anywhere; }
.models small { display: block; color: var(--quiet); font-size: 12px; }
.models .better, .models .worse { display: inline-block; border-radius: 4px; padding: 1px 6px; }
.models .better { background: var(--better); }
.models .worse { background: var(--worse); }
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
