"""Results of a comparison: style, KL, scores and win rates, with intervals over prompts."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_dist.generation.text_facts import text_facts
from dpo_dist.insight.evaluation import Column, Resampling, bootstrap_intervals

Row = dict[str, Any]
Key = tuple[str, ...]
"""A model and a metric; or two models and a metric, which is then of both."""
Means = Mapping[Key, tuple[float, list[float] | None]]
"""Means with their intervals; one without a value is absent."""

_RATE = "rate"
_SHARES = {_RATE, "finished", "refusals", "lists", "markdown", "empty"}
_DIFFERENCES = ("score", "kl", "length", "finished", "refusals", "empty")
"""Metrics whose differences between models have intervals."""
_STYLE = (
    *("length", "words", "finished", "refusals", "lists", "markdown"),
    *("distinct_3", "longest_repeat", "empty"),
)
_OUTCOMES = {1.0: "wins", 0.5: "ties", 0.0: "losses", None: "not_judged"}


def comparison(rows: Iterable[Row], models: Sequence[str], resampling: Resampling) -> dict[str, Any]:
    """Return the sections of `comparison.json` that follow from the rows of `answers.jsonl`.

    Args:
        rows: with the responses of every model.
        models: names, the base first.
        resampling: of the intervals.
    """
    # A value and its count for each prompt: a mean is the sum of values divided by the sum of counts.
    values: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    prompts = 0
    for row in rows:
        prompts += 1
        for model in models:
            for metric, value in _measured(row["responses"][model]).items():
                values[model, metric].append(value)
        for verdict in row.get("verdicts") or ():
            pair, credit = (verdict["first"], verdict["second"]), verdict["credit"]
            texts = [row["responses"][model]["text"] for model in pair]
            outcomes[pair][_OUTCOMES[credit]] += 1
            outcomes[pair]["identical"] += texts[0] == texts[1]
            values[*pair, _RATE].append((0.0, 0.0) if credit is None else (credit, 1.0))
    columns = {key: np.array(found, dtype=np.float64).T for key, found in values.items()}
    lowest = _with_empty_scores(columns, models)
    pairs = list(itertools.combinations(models, 2))
    means = _means(columns, pairs, prompts, resampling)
    return {
        "prompts": prompts,
        "models": [_model(name, means) for name in models],
        "wins": [_win(pair, counts, means) for pair, counts in outcomes.items() if (*pair, _RATE) in means],
        "differences": [
            _estimates(dict(zip(("first", "second"), pair, strict=True)), pair, means) for pair in pairs
        ],
        "empty_score": lowest,
        "not_judged": {
            f"{first} and {second}": counts["not_judged"]
            for (first, second), counts in outcomes.items()
            if counts["not_judged"]
        },
    }


def _measured(response: Row) -> dict[str, tuple[float, float]]:
    """Return the values of one response by metric, each with its count."""
    facts = text_facts(response["text"], response["tokens"], response["finished"])
    logp, base = response["logp"], response["base_logp"]
    ratio = None if logp is None or base is None else logp - base
    single: dict[str, float | None] = {
        "length": facts.tokens,
        "words": facts.words,
        "finished": facts.is_finished,
        "refusals": facts.is_refusal,
        "lists": facts.has_list,
        "markdown": facts.has_markdown,
        "distinct_3": facts.distinct_3,
        "longest_repeat": facts.longest_repeat,
        "empty": facts.is_empty,
        "kl": ratio,
        "score": response["score"],
    }
    found = {name: (0.0, 0.0) if value is None else (float(value), 1.0) for name, value in single.items()}
    return found | {"kl_per_token": (0.0, 0.0) if ratio is None else (ratio, float(response["logp_tokens"]))}


def _with_empty_scores(columns: dict[Key, Column], models: Sequence[str]) -> float | None:
    """Give empty responses, which the judge is not asked about, the lowest score of all, and return it."""
    scores = [columns[model, "score"] for model in models if (model, "score") in columns]
    lowest = min((float(value[count > 0].min()) for value, count in scores if count.any()), default=None)
    if lowest is not None:
        for model in models:
            scores_of, counts = columns[model, "score"]
            is_empty = (columns[model, "empty"][0] > 0) & (counts == 0)
            scores_of[is_empty], counts[is_empty] = lowest, 1.0
    return lowest


def _means(
    columns: Mapping[Key, Column], pairs: Iterable[tuple[str, str]], prompts: int, resampling: Resampling
) -> Means:
    """Return the mean of every metric that has a count, and of differences of models.

    The difference of two models, the second minus the first, is the mean over prompts where both have a
    value: as they respond to the same prompts, its interval is smaller than those of both would suggest.
    """
    differences: dict[Key, Column] = {}
    for first, second in pairs:
        for metric in _DIFFERENCES:
            (one, has_one), (other, has_other) = columns[first, metric], columns[second, metric]
            has_both = has_one * has_other
            differences[first, second, metric] = np.stack([(other - one) * has_both, has_both])
    measured = {key: (table[0], table[1]) for each in (columns, differences) for key, table in each.items()}
    ends = bootstrap_intervals(
        measured,
        np.arange(prompts, dtype=np.uint64),
        resampling.seed,
        resampling.resamples,
        {key for key in columns if key[-1] in _SHARES},
        {key for key in differences if key[-1] in _SHARES},
    )
    return {
        key: (float(values.sum() / counts.sum()), list(ends[key]) if key in ends else None)
        for key, (values, counts) in measured.items()
        if counts.sum()
    }


def _model(name: str, means: Means) -> Row:
    found: Row = {"name": name}
    for metric in ("kl", "kl_per_token", "score"):
        value, interval = means.get((name, metric), (None, None))
        found |= {metric: value, f"{metric}_interval": interval}
    style = {metric: means[name, metric] for metric in _STYLE if (name, metric) in means}
    return found | {
        "style": {metric: value for metric, (value, _) in style.items()},
        "style_intervals": {metric: ends for metric, (_, ends) in style.items() if ends is not None},
    }


def _win(pair: tuple[str, str], counts: Counter[str], means: Means) -> Row:
    rate, interval = means[*pair, _RATE]
    numbers = {name: counts[name] for name in (*_OUTCOMES.values(), "identical")}
    return {"first": pair[0], "second": pair[1], **numbers, "rate": rate, "interval": interval}


def _estimates(found: Row, pair: tuple[str, str], means: Means) -> Row:
    """Return the second model's means minus those of the first; of metrics that both have."""
    for metric in _DIFFERENCES:
        if (*pair, metric) in means:
            value, interval = means[*pair, metric]
            found |= {metric: value, f"{metric}_interval": interval}
    return found
