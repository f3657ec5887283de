"""Results of a comparison: style, KL, scores and win rates, with intervals over prompts."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_dist.generation.text_facts import text_facts
from dpo_dist.insight.compare.judging import LOSS, TIE, WIN
from dpo_dist.insight.evaluation import Column, Resampling, bootstrap_intervals

Row = dict[str, Any]
Measured = tuple[float, float]
"""A value and its count: a mean is the sum of values divided by the sum of counts."""
Columns = tuple[Column, Column]
"""Values and counts of all prompts."""
DIFFERENCES = ("score", "kl", "length", "finished", "refusals", "empty")
"""Metrics whose differences between models have intervals; a count of theirs is 0 or 1."""
_NOTHING = (0.0, 0.0)
_RATE = "rate"
_SHARES = frozenset({_RATE, "finished", "refusals", "lists", "markdown", "empty"})


@dataclass
class Tally:
    """Values of every prompt, by name of a metric; rows of `answers.jsonl` are added in their order.

    Attributes:
        models: names, the base first.
        prompts: number of rows.
        credited: prompts with a verdict, and those with a win, tie and loss, of every two models.
    """

    models: Sequence[str]
    prompts: int = 0
    credited: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    _values: dict[str, list[Measured]] = field(default_factory=dict)

    def add(self, responses: Mapping[str, Row], own_credits: Sequence[float | None] | None) -> None:
        """Add the responses to a prompt."""
        self.prompts += 1
        for name, response in responses.items():
            for metric, value in _measured(response).items():
                self._values.setdefault(_key(name, metric), []).append(value)
        if own_credits is None:
            return
        for (first, second), found in zip(itertools.combinations(self.models, 2), own_credits, strict=True):
            counts = self.credited.setdefault((first, second), Counter())
            counts["not_judged" if found is None else _OUTCOMES[found]] += 1
            counts["identical"] += responses[first]["text"] == responses[second]["text"]
            value = _NOTHING if found is None else (found, 1.0)
            self._values.setdefault(_key(first, second, _RATE), []).append(value)

    @property
    def lowest_score(self) -> float | None:
        """The lowest score of any response, as which empty ones count; None without scores."""
        scores = [self._values.get(_key(name, "score"), []) for name in self.models]
        return min((value for own in scores for value, count in own if count), default=None)

    def means(self, resampling: Resampling) -> dict[str, tuple[float, list[float] | None]]:
        """Return the mean of every metric that has a count, with its interval or None.

        The difference of two models, the second minus the first, is the mean over prompts where both have a
        value: as they respond to the same prompts, its interval is smaller than those of both would suggest.
        """
        columns = {name: _columns(values) for name, values in self._values.items()}
        columns |= self._with_empty_scores(columns)
        differences = dict(self._differences(columns))
        prompts = np.arange(self.prompts, dtype=np.uint64)
        shares, differing = (
            {name for name in names if name.rpartition("\n")[2] in _SHARES}
            for names in (columns, differences)
        )
        columns |= differences
        seed, resamples = resampling.seed, resampling.resamples
        ends = bootstrap_intervals(columns, prompts, seed, resamples, shares, differing)
        return {
            name: (float(values.sum() / counts.sum()), list(ends[name]) if name in ends else None)
            for name, (values, counts) in columns.items()
            if counts.sum()
        }

    def _with_empty_scores(self, columns: Mapping[str, Columns]) -> dict[str, Columns]:
        """Return the scores with those of empty responses, which the judge is not asked about."""
        lowest, found = self.lowest_score, {}
        if lowest is None:
            return {}
        for name in self.models:
            scores, counts = columns[_key(name, "score")]
            is_empty = (columns[_key(name, "empty")][0] > 0) & (counts == 0)
            filled = np.where(is_empty, lowest, scores), np.where(is_empty, 1.0, counts)
            found[_key(name, "score")] = filled
        return found

    def _differences(self, columns: Mapping[str, Columns]) -> Iterator[tuple[str, Columns]]:
        for first, second in itertools.combinations(self.models, 2):
            for metric in DIFFERENCES:
                (one, has_one), (other, has_other) = (columns[_key(name, metric)] for name in (first, second))
                has_both = has_one * has_other
                yield _key(first, second, metric), ((other - one) * has_both, has_both)


_OUTCOMES = {WIN: "wins", TIE: "ties", LOSS: "losses"}


def comparison(tally: Tally, resampling: Resampling) -> dict[str, Any]:
    """Return `models` and `wins` of `comparison.json`; `path` and the like are not in it."""
    means = tally.means(resampling)
    return {
        "models": [_model(name, means) for name in tally.models],
        "wins": [
            _win(pair, counts, means[_key(*pair, _RATE)])
            for pair, counts in tally.credited.items()
            if _key(*pair, _RATE) in means
        ],
        "differences": [_difference(pair, means) for pair in itertools.combinations(tally.models, 2)],
        "empty_score": tally.lowest_score,
        "not_judged": {
            f"{first} and {second}": counts["not_judged"]
            for (first, second), counts in tally.credited.items()
            if counts["not_judged"]
        },
    }


def _model(name: str, means: Mapping[str, tuple[float, list[float] | None]]) -> Row:
    found: Row = {"name": name}
    for metric in ("kl", "kl_per_token", "score"):
        value, interval = means.get(_key(name, metric), (None, None))
        found |= {metric: value, f"{metric}_interval": interval}
    style = {metric: means[_key(name, metric)] for metric in _STYLE if _key(name, metric) in means}
    return found | {
        "style": {metric: value for metric, (value, _) in style.items()},
        "style_intervals": {metric: ends for metric, (_, ends) in style.items() if ends is not None},
    }


def _win(pair: tuple[str, str], counts: Counter[str], mean: tuple[float, list[float] | None]) -> Row:
    names = ("wins", "ties", "losses", "identical", "not_judged")
    numbers = {name: counts[name] for name in names}
    return {"first": pair[0], "second": pair[1], **numbers, "rate": mean[0], "interval": mean[1]}


def _difference(pair: tuple[str, str], means: Mapping[str, tuple[float, list[float] | None]]) -> Row:
    """Return the second model's means minus those of the first; of metrics that both have."""
    found: Row = {"first": pair[0], "second": pair[1]}
    for metric in DIFFERENCES:
        if (key := _key(*pair, metric)) in means:
            value, interval = means[key]
            found |= {metric: value, f"{metric}_interval": interval}
    return found


_STYLE = (
    *("length", "words", "finished", "refusals", "lists", "markdown"),
    *("distinct_3", "longest_repeat", "empty"),
)


def _measured(response: Row) -> dict[str, Measured]:
    """Return the values of one response by metric."""
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
    found = {name: _NOTHING if value is None else (float(value), 1.0) for name, value in single.items()}
    return found | {"kl_per_token": _NOTHING if ratio is None else (ratio, float(response["logp_tokens"]))}


def _columns(values: Sequence[Measured]) -> Columns:
    table = np.array(values, dtype=np.float64)
    return table[:, 0], table[:, 1]


def _key(*parts: str) -> str:
    return "\n".join(parts)  # names have spaces, but no line ends
