"""Write the page that compares models: the result, tables with intervals, responses side by side."""

from collections import Counter
from collections.abc import Mapping
from itertools import chain, combinations
from typing import Any

from markupsafe import Markup

from dpo_dist.foundation import files
from dpo_dist.foundation.text import aligned, number, percent_of, pluralize, with_interval, without_secrets
from dpo_dist.kit import METRICS
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.results import DIFFERENCES
from dpo_dist.tools.pages.answers import Answers, prompt_items
from dpo_dist.tools.pages.charts import Interval, Point, scatter
from dpo_dist.tools.pages.render import number_above_interval, page, part

_Row = Mapping[str, Any]
Pair = tuple[str, str]
Rates = Mapping[Pair, tuple[float, Interval]]
"""Win rate of the first model over the second, with its interval; both orders of two models are keys."""
_Table = tuple[list[str], list[list[object]]]

MOST_BYTES = 5_000_000
_FRAME_BYTES = 150_000
_HALF = 0.5
_COLUMNS = ("kl", "score", "length", "finished", "refusals", "distinct_3", "longest_repeat", "empty")
_NO_SHARES = {
    "score": "score",
    "kl": "KL estimate, nats per response",
    "length": METRICS["samples/length"].title,
}
"""Titles of metrics that are not shares; all others are shares."""
_VERDICTS = {1.0: "loses to", 0.5: "ties with", 0.0: "wins over"}
"""What the other model did against the base, by the base's credit."""


def write_comparison_page(folder: ComparisonFolder, results: _Row) -> None:
    """Write `comparison.html` from the content of `comparison.json`, and from `answers.jsonl`."""
    results = without_secrets(results)
    rates = _rates(results)
    base = results["base"]
    prompts = [(row, _labels(row, base)) for row in files.read_lines(folder.comparison_answers)]
    items, omitted = prompt_items(prompts, MOST_BYTES - _FRAME_BYTES)
    labels = Counter(chain.from_iterable(labels for _, labels in prompts[: len(items)]))
    head = ["model", *map(_title, _COLUMNS), f"win rate over {base}"]
    rows: list[list[object]] = []
    for model in results["models"]:
        values = {**model, **model["style"]}
        ends = {"kl": model["kl_interval"], "score": model["score_interval"], **model["style_intervals"]}
        cells = [number_above_interval(values.get(each), ends.get(each), _scale(each)) for each in _COLUMNS]
        rate: object = "base"
        if model["name"] != base:
            value, interval = rates.get((model["name"], base), (None, None))
            rate = number_above_interval(value, interval, 100)
        rows.append([part("macros.jinja", "named", model["name"], model["path"]), *cells, rate])
    # Without empty columns. The base's own row does not count: it always has a KL of 0.
    columns = [0, *(at for at in range(1, len(head)) if any(row[at] for row in rows[1:]))]
    # A plot of quality against KL; the base, whose KL is 0, is a horizontal line.
    measure, qualities = _qualities(results)
    points = []
    for model in results["models"][1:]:
        name = model["name"]
        if name in qualities and (model["kl"] or 0) > 0:
            quality, interval = qualities[name]
            points.append(Point(name, model["kl"], quality, model["kl_interval"], interval))
    line = (qualities[base][0], base) if base in qualities else None
    html = page(
        "compare.jinja",
        "Comparison of models",
        ["compare.js"],
        results=results,
        headline=headline(results),
        overview=([head[at] for at in columns], [[row[at] for at in columns] for row in rows]),
        picture=scatter(points, f"KL to {base}, nats per response", measure, line),
        differences=_differences(results, rates),
        items=items,
        omitted=omitted,
        labels=dict(sorted(labels.items())),
    )
    files.write_text(folder.comparison_page, html)


def comparison_table(results: _Row) -> list[str]:
    """Return the table of models with 95 % intervals and the page's result, as lines.

    All win rates are on the page only.
    """
    base = results["base"]
    rates = _rates(results)
    has_scores = any(model["score"] is not None for model in results["models"])
    titles = ["model", "tokens", "finished", "refusals", f"KL to {base} (estimate)"]
    if has_scores:
        titles.append("score")
    if rates:
        titles.append(f"wins over {base}")
    rows = [titles]
    for model in results["models"]:
        style = model["style"]
        cells = [
            model["name"],
            f"{style['length']:.0f}",
            percent_of(style["finished"], results["prompts"]),
            percent_of(style["refusals"], results["prompts"]),
            with_interval(model["kl"], model["kl_interval"], ".2f"),
        ]
        if has_scores:
            cells.append(with_interval(model["score"], model["score_interval"], ".3f"))
        if rates:
            rate = rates.get((model["name"], base))
            cells.append(with_interval(*rate, ".3f") if rate else "")
        rows.append(cells)
    judge = "" if results["judge"] is None else f", judged by {results['judge']}"
    lines = [f"comparison on {pluralize(results['prompts'], 'prompt')}{judge}", *aligned(rows)]
    lines += headline(results)
    not_judged = sum(results["not_judged"].values())
    if not_judged:
        comparisons = pluralize(not_judged, "comparison")
        lines.append(f"note: not counted, because the judge gave no verdict: {comparisons}")
    return lines


def headline(results: _Row) -> list[str]:
    """Return sentences that name the best model by its mean, and models that are not clearly worse.

    A model whose responses never end is not ranked: the judge saw only their beginnings.
    """
    sentences = _ranking_sentences(results)
    counts = results.get("prompts_also_in_train", {}).items()
    facts = " and ".join(f"{name} was trained on {count:,} of them" for name, count in counts if count)
    if facts:
        sentences.append(f"Not all prompts are held out: {facts}.")
    return sentences


def _ranking_sentences(results: _Row) -> list[str]:
    measure, qualities = _qualities(results)
    models = {model["name"]: model for model in results["models"]}
    ranked = [name for name in qualities if models[name]["style"]["finished"]]
    if not qualities:
        return ["Without a judge, models can be compared by KL and style only."]
    if not ranked:
        return ["No response ends within sampling.max_new_tokens, so the models are not ranked."]
    best = max(ranked, key=lambda name: (qualities[name][0], -(models[name]["kl"] or 0)))
    sentences = [f"{best} has the highest {measure}, {number(qualities[best][0])}."]
    if best == results["base"] and measure != "score":
        sentences = [f"No model wins over {best} on more than half of the prompts."]
    not_ranked = [name for name in qualities if name not in ranked]
    if not_ranked:
        sentences.append(f"Not ranked, because no response ends: {', '.join(not_ranked)}.")
    rates = _rates(results)
    others = [name for name in ranked if name != best]
    as_good = []
    for name in others:
        _, ends = rates.get((name, best), (_HALF, None))
        if _side(ends, _HALF) >= 0:
            as_good.append(name)
    if as_good:
        sentences.append(f"Not clearly worse: {', '.join(as_good)}.")
    elif others:
        sentences.append("All others are clearly worse.")
    return sentences


def _title(metric: str) -> str:
    return _NO_SHARES.get(metric) or METRICS[f"samples/{metric}"].title


def _rates(results: _Row) -> Rates:
    rates: dict[Pair, tuple[float, Interval]] = {}
    for win in results["wins"]:
        rate = win["rate"]
        ends = win["interval"]
        rates[win["first"], win["second"]] = rate, ends
        rates[win["second"], win["first"]] = 1 - rate, ends and [1 - ends[1], 1 - ends[0]]
    return rates


def _side(ends: Interval, value: float) -> int:
    """Return 1 for an interval above the value, -1 below; 0 if it contains the value, or is not known."""
    if not ends:
        return 0
    return (ends[0] > value) - (ends[1] < value)


def _qualities(results: _Row) -> tuple[str, dict[str, tuple[float, Interval]]]:
    """Return the name of the measure of quality, and each model's value with its interval.

    The measure is the score or, without scores, the win rate over the base (one half for the base itself).
    """
    base = results["base"]
    scores = {}
    for model in results["models"]:
        if model["score"] is not None:
            scores[model["name"]] = (model["score"], model["score_interval"])
    if scores:
        return "score", scores
    rates = {model: rate for (model, other), rate in _rates(results).items() if other == base}
    if rates:
        rates = {base: (_HALF, None), **rates}
    return f"win rate over {base}", rates


def _scale(metric: str) -> float:
    return 1 if metric in _NO_SHARES else 100


def _differences(results: _Row, rates: Rates) -> _Table:
    """Return the table of win rates and differences between every two models."""
    by_pair = {(row["first"], row["second"]): row for row in results["differences"]}
    pairs = combinations((model["name"] for model in results["models"]), 2)
    metrics = [metric for metric in DIFFERENCES if any(row.get(metric) for row in by_pair.values())]
    rows: list[list[object]] = []
    for first, second in pairs:
        row = by_pair.get((first, second), {})
        rate = rates.get((second, first))
        win = Markup("")
        if rate is not None:
            kind = ("worse", "open", "better")[1 + _side(rate[1], _HALF)]
            win = Markup('<span class="{}">{}</span>').format(kind, number_above_interval(*rate, 100))
        cells = [win] if rates else []
        for metric in metrics:
            value = row.get(metric)
            ends = row.get(f"{metric}_interval")
            scale = _scale(metric)
            cell = Markup("") if value is None else Markup("{:+.3g}").format(scale * value)
            if ends:
                low, high = ends
                cell += Markup(" <small>[{:+.3g}, {:+.3g}]</small>").format(scale * low, scale * high)
            kind = "clear" if _side(ends, 0) else "open"
            cells.append(Markup('<span class="{}">{}</span>').format(kind, cell))
        rows.append([part("macros.jinja", "named", second, f"minus {first}"), *cells])
    titles = list(map(_title, metrics))
    if rates:
        titles.insert(0, "win rate")
    return ["models", *titles], rows if titles else []


def _labels(row: Answers, base: str) -> list[str]:
    """Return the labels by which a prompt is filtered."""
    labels = [f"source {row['source']}"]
    if any(not response["finished"] for response in row["responses"].values()):
        labels.append("a response does not end")
    if any(not response["text"].strip() for response in row["responses"].values()):
        labels.append("a response is empty")
    for verdict in row.get("verdicts") or ():
        if verdict["first"] == base and verdict["credit"] in _VERDICTS:
            labels.append(f"{verdict['second']} {_VERDICTS[verdict['credit']]} {base}")
    return labels
