"""Compute the results of a comparison: judgements, style, KL, scores, win rates, intervals over prompts."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import py3langid  # noqa: F401  (without this package the comparison would silently lack languages)

from dpo_dist.data import PreferenceRecord
from dpo_dist.kit import Column, bootstrap_intervals
from dpo_dist.tools.sampling.judges import Judge, Question
from dpo_dist.tools.sampling.keys import PairsConfig, Verdicts
from dpo_dist.tools.text_facts import text_facts

_Row = dict[str, Any]
_Key = tuple[str, ...]
"""A model and a metric, or two models and a metric that compares the two."""
Means = Mapping[_Key, tuple[float, list[float] | None]]
"""Means with their intervals; a metric without a value is left out."""

_RATE = "rate"
_SHARES = {_RATE, "finished", "refusals", "empty"}
DIFFERENCES = ("score", "kl", "length", "finished", "refusals", "empty")
"""Metrics whose differences between models have intervals."""
_NO_STYLE = ("kl", "kl_per_token", "score")
WON = 1.0
TIED = 0.5
LOST = 0.0
_OUTCOMES = {WON: "wins", TIED: "ties", LOST: "losses", None: "not_judged"}


def compares(pairs: PairsConfig) -> bool:
    """Return whether the judge compares two responses instead of scoring each."""
    return pairs.endpoint.url is not None and pairs.endpoint.verdicts is Verdicts.compare


def judge_texts(
    records: Sequence[PreferenceRecord], texts: Sequence[Sequence[str]], judge: Judge, *, in_pairs: bool
) -> list[_Row]:
    """Return for each prompt `scores` of the texts, `credits` of the first text of every two, and `counts`.

    `in_pairs`: the judge compares texts and gives no scores; else credits follow from the scores. The judge
    sees each different text, or pair of texts, once, and no empty text. A score or credit is null without a
    usable verdict. Credits are in the order of `itertools.combinations`, counts are the judge's.
    """
    questions_by_prompt = []
    for record, responses in zip(records, texts, strict=True):
        groups = [tuple(dict.fromkeys(filter(str.strip, responses)))]
        if in_pairs:
            pairs = dict.fromkeys(itertools.combinations(responses, 2))
            groups = [pair for pair in pairs if without_judge(*pair) is None]
        questions_by_prompt.append([Question(record, group) for group in groups if group])
    judgements = iter(judge.judge(list(itertools.chain(*questions_by_prompt))))
    rows = []
    for responses, questions in zip(texts, questions_by_prompt, strict=True):
        scores = dict[str, float | None]()
        verdicts = dict[_Key, float | None]()
        counts = Counter[str]()
        for question in questions:
            judgement = next(judgements)
            counts += judgement.counts
            if in_pairs:
                verdicts[question.responses] = judgement.scores[0]
            else:
                scores = dict(zip(question.responses, judgement.scores, strict=True))
        first_credits = []
        for pair in itertools.combinations(responses, 2):
            by_scores = credit(*((text, scores.get(text)) for text in pair))
            first_credits.append(verdicts.get(pair, by_scores))
        row = {
            "scores": [scores.get(text) for text in responses],
            "credits": first_credits,
            "counts": dict(sorted((+counts).items())),
        }
        rows.append(row)
    return rows


def without_judge(first: str, second: str) -> float | None:
    """Return the first response's credit where equal responses tie or an empty one loses, else None."""
    texts = (first.strip(), second.strip())
    if first == second or not any(texts):
        return TIED
    if all(texts):
        return None
    return WON if texts[0] else LOST


def credit(first: tuple[str, float | None], second: tuple[str, float | None]) -> float | None:
    """Return the first response's credit, from both texts and scores; None if a needed score is missing."""
    text, score = first
    other_text, other_score = second
    credit_of_texts = without_judge(text, other_text)
    if credit_of_texts is not None or score is None or other_score is None:
        return credit_of_texts
    if score == other_score:
        return TIED
    return WON if score > other_score else LOST


def comparison(rows: Iterable[_Row], models: Sequence[str]) -> dict[str, Any]:
    """Return the sections of `comparison.json` that are computed from the rows of `answers.jsonl`."""
    # A value and a count for each prompt: a mean is the sum of values divided by the sum of counts.
    values: dict[_Key, list[tuple[float, float]]] = defaultdict(list)
    outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    prompts = 0
    for row in rows:
        prompts += 1
        for model in models:
            for metric, value in _measure_response(row["responses"][model]).items():
                values[model, metric].append(value)
        for verdict in row.get("verdicts") or ():
            pair = (verdict["first"], verdict["second"])
            credit = verdict["credit"]
            outcomes[pair][_OUTCOMES[credit]] += 1
            values[*pair, _RATE].append(_term(credit))
    columns = {key: np.array(column, dtype=np.float64).T for key, column in values.items()}
    lowest = _score_empty_responses(columns, models) if prompts else None
    pairs = list(itertools.combinations(models, 2))
    means = _means(columns, pairs, prompts)
    wins = []
    not_judged = {}
    for (first, second), counts in outcomes.items():
        if (first, second, _RATE) in means:
            rate, interval = means[first, second, _RATE]
            row = {"first": first, "second": second, **{name: counts[name] for name in _OUTCOMES.values()}}
            wins.append({**row, "rate": rate, "interval": interval})
        if counts["not_judged"]:
            not_judged[f"{first} and {second}"] = counts["not_judged"]
    differences = []
    for pair in pairs:
        metrics = [metric for metric in DIFFERENCES if (*pair, metric) in means]
        differences.append({"first": pair[0], "second": pair[1], **_estimates(pair, metrics, means)})
    return {
        "prompts": prompts,
        "models": [_model(name, means) for name in models],
        "wins": wins,
        "differences": differences,
        "empty_score": lowest,
        "not_judged": not_judged,
    }


def _score_empty_responses(columns: Mapping[_Key, Column], models: Sequence[str]) -> float | None:
    """Give the lowest score of all to empty responses, which the judge does not see; return it."""
    lowest = None
    for model in models:
        scores, has_score = columns[model, "score"]
        if has_score.any():
            least = float(scores[has_score > 0].min())
            lowest = least if lowest is None else min(lowest, least)
    if lowest is not None:
        for model in models:
            scores, has_score = columns[model, "score"]
            is_empty = (columns[model, "empty"][0] > 0) & (has_score == 0)
            scores[is_empty] = lowest
            has_score[is_empty] = 1.0
    return lowest


def _measure_response(response: _Row) -> dict[str, tuple[float, float]]:
    facts = text_facts(response["text"], response["tokens"], response["finished"])
    measures = {**vars(facts), "kl": None, "score": response["score"]}
    del measures["language"]
    ratio_per_token = (0.0, 0.0)
    if response["logp"] is not None and response["base_logp"] is not None:
        measures["kl"] = response["logp"] - response["base_logp"]
        ratio_per_token = (measures["kl"], float(response["logp_tokens"]))
    terms = {name: _term(value) for name, value in measures.items()}
    return {**terms, "kl_per_token": ratio_per_token}


def _term(value: float | None) -> tuple[float, float]:
    """Return a value and its count for a mean."""
    return (0.0, 0.0) if value is None else (float(value), 1.0)


def _means(columns: Mapping[_Key, Column], pairs: Iterable[tuple[str, str]], prompts: int) -> Means:
    """Return the mean of every metric that has a count, and of the differences between models.

    The difference of two models is the mean of second minus first over prompts where both have a value.
    Because both respond to the same prompts, its interval is narrower than their own intervals suggest.
    """
    differences: dict[_Key, Column] = {}
    for first, second in pairs:
        for metric in DIFFERENCES:
            value, has_value = columns[first, metric]
            other, has_other = columns[second, metric]
            has_both = has_value * has_other
            differences[first, second, metric] = np.stack([(other - value) * has_both, has_both])
    measures = {key: (table[0], table[1]) for key, table in {**columns, **differences}.items()}
    lowest = {}
    for key in measures:
        if key[-1] in _SHARES:
            lowest[key] = -1.0 if key in differences else 0.0
    ends = bootstrap_intervals(measures, np.arange(prompts, dtype=np.uint64), lowest=lowest)
    means = {}
    for key, (values, counts) in measures.items():
        if counts.sum():
            interval = list(ends[key]) if key in ends else None
            means[key] = (float(values.sum() / counts.sum()), interval)
    return means


def _model(name: str, means: Means) -> _Row:
    style = {}
    style_intervals = {}
    for key, (value, ends) in means.items():
        is_style = key[:-1] == (name,) and key[1] not in _NO_STYLE
        if is_style:
            style[key[1]] = value
        if is_style and ends is not None:
            style_intervals[key[1]] = ends
    return {
        "name": name,
        **_estimates((name,), _NO_STYLE, means),
        "style": style,
        "style_intervals": style_intervals,
    }


def _estimates(models: _Key, metrics: Iterable[str], means: Means) -> _Row:
    """Return the means of one model, or the differences of two, with intervals; None where unknown."""
    row: _Row = {}
    for metric in metrics:
        row[metric], row[f"{metric}_interval"] = means.get((*models, metric), (None, None))
    return row
