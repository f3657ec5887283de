"""The page of a comparison of models: the result, tables with intervals, responses side by side."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from markupsafe import Markup

from dpo_dist.config.metrics import METRICS
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation import files
from dpo_dist.foundation.text import number, without_secrets
from dpo_dist.insight.pages.charts import Interval, Point, scatter
from dpo_dist.insight.pages.render import estimate, json_rows, page, part
from dpo_dist.insight.pages.samples import Response, Shown, end_notes, prompt_items

Row = Mapping[str, Any]
Pair = tuple[str, str]
Rates = Mapping[Pair, tuple[float, Interval]]
"""Win rate of the first model over the second with its interval, in both orders."""
Table = tuple[list[str], list[list[object]]]

MOST_BYTES = 5_000_000
_FRAME_BYTES = 150_000
_MOST_PAIRS = 15
_MOST_FILTERED = 8
_HALF = 0.5
_STYLE = ("length", "finished", "refusals", "distinct_3", "longest_repeat", "empty")
_DIFFERENCES = ("score", "kl", "length", "finished", "refusals", "empty")
_TITLES = {"score": "score", "kl": "KL, nats per response"}
_NO_SHARES = ("score", "kl", "length")
_VERDICTS = {1.0: "loses to", 0.5: "ties with", 0.0: "wins over"}
"""By the credit of the base, what the other model does."""


def write_comparison_page(folder: RunFolder, results: Row) -> None:
    """Write `comparison.html` from the content of `comparison.json`, and from `answers.jsonl`."""
    results = without_secrets(results)
    rates = _rates(results)
    prompts = [_prompt(row, results) for row in json_rows(folder.comparison_answers) if row]
    items, omitted = prompt_items(prompts, MOST_BYTES - _FRAME_BYTES)
    labels = Counter(label for shown in prompts[: len(items)] for label in shown.labels)
    html = page(
        "compare.jinja",
        "Comparison of models",
        ["compare.js"],
        models=len(results["models"]),
        prompts=results["prompts"],
        base=results["base"],
        judge=results["judge"],
        compares=results["judge_compares"],
        counts=results["counts"],
        temperature=results["sampling"]["temperature"],
        headline=headline(results),
        overview=_overview(results, rates),
        picture=_picture(results, rates),
        differences=_differences(results, rates),
        style_of_responses=_style(results),
        items=items,
        omitted=omitted,
        labels=dict(sorted(labels.items())),
    )
    files.write_text(folder.comparison_page, html)


def headline(results: Row) -> list[str]:
    """Return the best model by its mean, then the models that no interval shows to be worse, in sentences.

    A model of which no response ends is not called the best: the judge saw beginnings of its responses only.
    """
    rates, base = _rates(results), results["base"]
    means = {
        model["name"]: quality[0]
        for model in results["models"]
        if (quality := _quality(model, results, rates))
    }
    models = {model["name"]: model for model in results["models"]}
    ranked = [name for name in means if models[name]["style"]["finished"]]
    if not means:
        return ["Without a judge the models can be compared by KL and style only."]
    if not ranked:
        return ["No response ends within compare.max_new_tokens: no model is called the best."]
    best = max(ranked, key=lambda name: (means[name], -(models[name]["kl"] or 0)))
    sentences = [f"{best} has the highest {_measure(results)}, {number(means[best])}."]
    if best == base and not _has_scores(results):
        sentences = [f"No model wins over {base} on more than half of the prompts."]
    if unended := ", ".join(name for name in means if name not in ranked):
        sentences.append(f"Not ranked, as no response ends: {unended}.")
    others = [name for name in ranked if name != best]
    as_good = ", ".join(
        name for name in others if _side(rates.get((name, best), (_HALF, None))[1], _HALF) >= 0
    )
    if others:
        sentences.append(f"Not clearly worse: {as_good}." if as_good else "All others are clearly worse.")
    return sentences


def _measure(results: Row) -> str:
    return "score" if _has_scores(results) else f"win rate over {results['base']}"


def _title(metric: str) -> str:
    return _TITLES.get(metric) or METRICS[f"samples/{metric}"].title


def _rates(results: Row) -> Rates:
    rates: dict[Pair, tuple[float, Interval]] = {}
    for win in results["wins"]:
        rate, ends = win["rate"], win["interval"]
        rates[win["first"], win["second"]] = rate, ends
        rates[win["second"], win["first"]] = 1 - rate, ends and [1 - ends[1], 1 - ends[0]]
    return rates


def _side(ends: Interval, of: float) -> int:
    """Return 1 if an interval is above a value, -1 if it is below, 0 if it contains it or is not known."""
    return 0 if not ends else (ends[0] > of) - (ends[1] < of)


def _has_scores(results: Row) -> bool:
    return any(model["score"] is not None for model in results["models"])


def _quality(model: Row, results: Row, rates: Rates) -> tuple[float, Interval] | None:
    """Return the score of a model, or without scores its win rate over the base; of the base one half."""
    if _has_scores(results):
        return None if model["score"] is None else (model["score"], model["score_interval"])
    if model["name"] == results["base"]:
        return (_HALF, None) if rates else None
    return rates.get((model["name"], results["base"]))


def _overview(results: Row, rates: Rates) -> Table:
    """Return the models with KL, score and win rate over the base, as far as there are any."""
    base = results["base"]
    head = ["model", "KL, nats per response", "score", f"win rate over {base}"]
    rows: list[list[object]] = [
        [
            _name(model["name"], model["path"]),
            estimate(model["kl"], model["kl_interval"]),
            estimate(model["score"], model["score_interval"]),
            "base" if model["name"] == base else _rate(rates.get((model["name"], base))),
        ]
        for model in results["models"]
    ]
    # The base has a KL of 0 and no win rate.
    kept = [0, *(at for at in range(1, len(head)) if any(row[at] for row in rows[1:]))]
    return [head[at] for at in kept], [[row[at] for at in kept] for row in rows]


def _name(name: str, small: str) -> Markup:
    return part("macros.jinja", "named", name, small)


def _style(results: Row) -> Table:
    """Return the style of the models' responses; lengths also relative to those of the base."""
    base = results["models"][0]
    rows: list[list[object]] = []
    for model in results["models"]:
        style, ends = model["style"], model["style_intervals"]
        cells = [estimate(style.get(each), ends.get(each), _scale(each)) for each in _STYLE]
        if base["style"]["length"] and model is not base:
            times = style["length"] / base["style"]["length"]
            cells[0] += Markup("<small>{:.2f} times</small>").format(times)
        rows.append([model["name"], *cells])
    return ["model", *map(_title, _STYLE)], rows


def _rate(rate: tuple[float, Interval] | None) -> Markup:
    return estimate(rate[0], rate[1], 100) if rate else Markup("")


def _scale(metric: str) -> float:
    return 1 if metric in _NO_SHARES else 100


def _differences(results: Row, rates: Rates) -> Table:
    """Return win rates and differences of every two models; of many those from the base."""
    found = {(row["first"], row["second"]): row for row in results["differences"]}
    pairs = list(combinations((model["name"] for model in results["models"]), 2))
    shown = pairs if len(pairs) <= _MOST_PAIRS else [pair for pair in pairs if pair[0] == results["base"]]
    metrics = [metric for metric in _DIFFERENCES if any(row.get(metric) for row in found.values())]
    rows: list[list[object]] = []
    for first, second in shown:
        row, rate = found.get((first, second), {}), rates.get((second, first))
        win = Markup("")
        if rate is not None:
            kind = ("worse", "open", "better")[1 + _side(rate[1], _HALF)]
            win = Markup('<span class="{}">{}</span>').format(kind, _rate(rate))
        cells = [win] if rates else []
        cells += [_difference(metric, row.get(metric), row.get(f"{metric}_interval")) for metric in metrics]
        rows.append([_name(second, f"minus {first}"), *cells])
    titles = [*(["win rate"] if rates else []), *map(_title, metrics)]
    return ["models", *titles], rows if titles else []


def _difference(metric: str, value: float | None, ends: Interval) -> Markup:
    if value is None:
        return Markup("")
    scale, interval = _scale(metric), Markup("")
    if ends:
        interval = Markup(" <small>[{:+.3g}, {:+.3g}]</small>").format(*(scale * end for end in ends))
    kind = "clear" if _side(ends, 0) else "open"
    return Markup('<span class="{}">{:+.3g}{}</span>').format(kind, scale * value, interval)


def _picture(results: Row, rates: Rates) -> Markup:
    """Return the picture of quality against KL; the base, whose KL is 0, is a line."""
    base, *others = results["models"]
    points = [
        Point(model["name"], model["kl"], quality[0], model["kl_interval"], quality[1])
        for model in others
        if (model["kl"] or 0) > 0 and (quality := _quality(model, results, rates))
    ]
    level = _quality(base, results, rates)
    line = (level[0], base["name"]) if level else None
    return scatter(points, f"KL to {base['name']}, nats per response", _measure(results), line)


def _prompt(row: Row, results: Row) -> Shown:
    base, *others = (model["name"] for model in results["models"])
    scores = {name: row["responses"][name]["score"] for name in (base, *others)}
    differences = [
        abs(score - scores[base]) for score in scores.values() if None not in (score, scores[base])
    ]
    labels = list(_labels(row, base, others))
    return Shown(
        row["prompt"],
        list(_responses(row, base, others)),
        base,
        "; ".join(labels),
        labels,
        0.0 - max(differences, default=0.0),
    )


def _labels(row: Row, base: str, others: Sequence[str]) -> Iterator[str]:
    """Yield the labels of the filters that show a prompt."""
    yield f"source {row['source']}"
    if any(not response["finished"] for response in row["responses"].values()):
        yield "a response does not end"
    if any(not response["text"].strip() for response in row["responses"].values()):
        yield "a response is empty"
    for verdict in row.get("verdicts") or ():
        is_shown = verdict["first"] == base and verdict["second"] in others[:_MOST_FILTERED]
        if is_shown and verdict["credit"] in _VERDICTS:
            yield f"{verdict['second']} {_VERDICTS[verdict['credit']]} {base}"


def _responses(row: Row, base: str, others: Sequence[str]) -> Iterator[Response]:
    for name in (base, *others):
        response = row["responses"][name]
        notes = [end_notes(response["tokens"], response["finished"])]
        logp, of_base = response["logp"], response["base_logp"]
        if response["score"] is not None:
            notes.append(f"score {number(response['score'])}")
        if name != base and logp is not None and of_base is not None:
            notes.append(f"log-ratio {number(logp - of_base)} nats")
        yield Response(name, response["text"], "; ".join(notes))
    if row["chosen"] is not None:
        yield Response("chosen in the data", row["chosen"])
