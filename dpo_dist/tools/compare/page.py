"""Write the page that compares models: the result, tables with intervals, responses side by side."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from dpo_dist.foundation import files
from dpo_dist.foundation.text import aligned, number, percent_of, pluralize, without_secrets
from dpo_dist.foundation.text import with_interval as in_one_line
from dpo_dist.kit import METRICS
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.results import DIFFERENCES
from dpo_dist.tools.pages.answers import AnswersRow, answer_blocks
from dpo_dist.tools.pages.blocks import (
    Chart,
    Heading,
    Interval,
    Line,
    PageBlock,
    Table,
    Text,
    above_interval,
    titled_section,
)
from dpo_dist.tools.pages.render import page

_Row = Mapping[str, Any]
Pair = tuple[str, str]
Rates = Mapping[Pair, tuple[float, Interval]]
"""Win rate of the first model over the second, with its interval; both orders of two models are keys."""

_ROOM = 4_000_000  # characters of texts
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
_MODELS = "Brackets: 95 % intervals over prompts. KL: between whole responses of the model and of {base}."
_KL_AND_QUALITY = (
    "Bars: 95 % intervals over prompts. Of two models with the same quality, the one with the smaller KL has "
    "changed less to get it."
)
_DIFFERENCES = (
    "The first model minus the second, over prompts where both have a value; shares are in percentage "
    "points. In a win rate a tie is half a win. A star: the 95 % interval excludes 0, or 50 % for a win "
    "rate."
)
_RESPONSES = (
    "The largest differences of scores come first. Marked words are not in the response of {base}. Texts of "
    "data and models can be offensive or private."
)
_SAMPLED = (
    "These responses are sampled at a temperature of {}, and unlikely words can make a small model look "
    "broken; sampling.temperature=0 takes the likeliest words."
)


def write_comparison_page(folder: ComparisonFolder, results: _Row) -> None:
    """Write `comparison.html` from the content of `comparison.json`, and from `answers.jsonl`."""
    results = without_secrets(results)
    rates = _rates(results)
    base = results["base"]
    models = pluralize(len(results["models"]), "model")
    judge = "no judge" if results["judge"] is None else f"judge: {results['judge']}"
    rows = sorted(files.read_lines(folder.comparison_answers), key=_difference, reverse=True)
    blocks: list[PageBlock] = [
        Text(f"{models}, {pluralize(results['prompts'], 'prompt')}, {judge}."),
        Text("", "good", " ".join(headline(results))),
        Heading("Models"),
        _overview(results, rates),
        Text(_MODELS.format(base=base), "note"),
        *(Text(sentence) for sentence in _biases(results["sampling"])),
        *_kl_and_quality(results),
        *titled_section("Differences", _differences(results, rates)),
        Heading("Responses"),
        Text(_RESPONSES.format(base=base), "note"),
    ]
    temperature = results["sampling"]["temperature"]
    if temperature:
        blocks.append(Text(_SAMPLED.format(number(temperature)), "note"))
    blocks += answer_blocks([(row, "; ".join(_labels(row, base))) for row in rows], _ROOM)
    files.write_text(folder.comparison_page, page("Comparison of models", blocks))


def _difference(row: AnswersRow) -> float:
    """Return how far the scores of a prompt's responses differ from that of the first one."""
    scores = [response.get("score") for response in row["responses"].values()]
    known = [score for score in scores if score is not None and scores[0] is not None]
    return max((abs(score - scores[0]) for score in known), default=0.0)


def _overview(results: _Row, rates: Rates) -> Table:
    """Return the table of models, without metrics that no model but the base has."""
    base = results["base"]
    rows = []
    for model in results["models"]:
        values = {**model, **model["style"]}
        ends = {"kl": model["kl_interval"], "score": model["score_interval"], **model["style_intervals"]}
        cells = [_cell(each, values.get(each), ends.get(each)) for each in _COLUMNS]
        rate = rates.get((model["name"], base), (None, None))
        cells.append("base" if model["name"] == base else _cell("rate", *rate))
        rows.append([f"{model['name']}\n{model['path']}", *cells])
    head = ["model", *map(_title, _COLUMNS), f"win rate over {base}"]
    kept = [at for at in range(len(head)) if any(row[at] for row in rows[1:])]
    return Table([head[at] for at in kept], [[row[at] for at in kept] for row in rows])


def _cell(metric: str, value: float | None, ends: Interval, form: str = ".3g") -> str:
    """Return a value with its interval, shares in percent; "" for None."""
    if value is None:
        return ""
    scale = 1 if metric in _NO_SHARES else 100
    unit = "" if scale == 1 else " %"
    text = f"{scale * value:{form}}{unit}"
    return above_interval(text, *(f"{scale * end:{form}}" for end in ends)) if ends else text


def _biases(sampling: _Row) -> Iterator[str]:
    """Yield why the estimate of the KL is biased."""
    if sampling["temperature"] != 1:
        temperature = number(sampling["temperature"])
        yield (
            f"Sampled at a temperature of {temperature}: the estimate of the KL is biased; at a temperature "
            "of 1 it is not."
        )
    if sampling["temperature"] and (sampling["top_p"] < 1 or sampling["top_k"]):
        yield (
            f"Sampled from the likeliest tokens only (top_p {number(sampling['top_p'])}, top_k "
            f"{sampling['top_k'] or 'none'}): the estimate of the KL is biased."
        )


def _kl_and_quality(results: _Row) -> list[PageBlock]:
    """Return the chart of quality against KL; the base, whose KL is 0, is a horizontal line."""
    base = results["base"]
    measure, qualities = _qualities(results)
    points = []
    for model in results["models"][1:]:
        if model["name"] in qualities and (model["kl"] or 0) > 0:
            quality, interval = qualities[model["name"]]
            points.append(Line(model["name"], [model["kl"]], [quality], "point", [interval]))
    if not points:
        return []
    if base in qualities:
        ends = sorted(line.xs[0] for line in points)
        points.append(Line(base, [ends[0], ends[-1]], [qualities[base][0]] * 2, "noise"))
    over = f"KL to {base}, nats per response"
    ticks = {line.xs[0]: number(line.xs[0]) for line in points}
    return [
        Heading("KL and quality"),
        Chart(measure, points, over=over, is_log=True, ticks=ticks, note=_KL_AND_QUALITY),
    ]


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
            in_one_line(model["kl"], model["kl_interval"], ".2f"),
        ]
        if has_scores:
            cells.append(in_one_line(model["score"], model["score_interval"], ".3f"))
        if rates:
            rate = rates.get((model["name"], base))
            cells.append(in_one_line(*rate, ".3f") if rate else "")
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


def _differences(results: _Row, rates: Rates) -> list[PageBlock]:
    """Return the table of win rates and differences between every two models, and what it is of."""
    by_pair = {(row["first"], row["second"]): row for row in results["differences"]}
    pairs = combinations((model["name"] for model in results["models"]), 2)
    metrics = [metric for metric in DIFFERENCES if any(row.get(metric) for row in by_pair.values())]
    rows = []
    for first, second in pairs:
        row = by_pair.get((first, second), {})
        cells = [f"{second}\nminus {first}"]
        if rates:
            rate, interval = rates.get((second, first), (None, None))
            cells.append(_starred(_cell("rate", rate, interval), _side(interval, _HALF)))
        for metric in metrics:
            ends = row.get(f"{metric}_interval")
            cells.append(_starred(_cell(metric, row.get(metric), ends, "+.3g"), _side(ends, 0)))
        rows.append(cells)
    titles = ["models", *(["win rate"] if rates else []), *map(_title, metrics)]
    if len(titles) == 1 or not rows:
        return []
    blocks: list[PageBlock] = [Table(titles, rows), Text(_DIFFERENCES, "note")]
    if results["judge"] is not None:
        sentence = "The judge gave every response a score, and the higher score wins."
        if results["judge_compares"]:
            sentence = (
                "The judge compared every two responses in both positions; a verdict that changes with the "
                "position is a tie."
            )
        counts = "; ".join(f"{name.replace('_', ' ')}: {count}" for name, count in results["counts"].items())
        blocks.append(Text(f"{sentence} Counts: {counts}." if counts else sentence))
    return blocks


def _starred(cell: str, side: int) -> str:
    """Return a cell with a star behind its value if its interval is on one side."""
    value, end, interval = cell.partition("\n")
    return f"{value} *{end}{interval}" if side else cell


def _labels(row: AnswersRow, base: str) -> list[str]:
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
