"""Results of a comparison: style, KL, scores and win rates, with intervals over prompts."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_dist.comparison.judging import LOSS, TIE, WIN, credit
from dpo_dist.evaluation.intervals import Column, bootstrap_intervals
from dpo_dist.evaluation.results import Resampling
from dpo_dist.generation.text_facts import text_facts

Row = dict[str, Any]
Measured = tuple[float, float]
"""A value and its count: a mean is the sum of values divided by the sum of counts."""
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

    def add(
        self, responses: Mapping[str, Row], verdicts: Sequence[float | None] | None, has_judge: bool
    ) -> None:
        """Add the responses to a prompt.

        Args:
            responses: by model, as in `answers.jsonl`.
            verdicts: credits of the first of every two models, if the judge compares; None: scores decide.
            has_judge: whether there are verdicts or scores.
        """
        self.prompts += 1
        for name, response in responses.items():
            for metric, value in _measured(response).items():
                self._values.setdefault(_key(name, metric), []).append(value)
        if not has_judge:
            return
        for at, (first, second) in enumerate(itertools.combinations(self.models, 2)):
            one, other = responses[first], responses[second]
            scores = one["score"], other["score"]
            found = verdicts[at] if verdicts else credit(one["text"], other["text"], scores)
            counts = self.credited.setdefault((first, second), Counter())
            counts["not_judged" if found is None else _OUTCOMES[found]] += 1
            counts["identical"] += one["text"] == other["text"]
            value = _NOTHING if found is None else (found, 1.0)
            self._values.setdefault(_key(first, second, _RATE), []).append(value)

    def means(self, resampling: Resampling) -> dict[str, tuple[float, list[float] | None]]:
        """Return the mean of every metric that has a count, with its interval or None."""
        columns = {name: _columns(values) for name, values in self._values.items()}
        prompts = np.arange(self.prompts, dtype=np.uint64)
        shares = {name for name in columns if name.rpartition("\n")[2] in _SHARES}
        ends = bootstrap_intervals(columns, prompts, resampling.seed, resampling.resamples, shares)
        return {
            name: (float(values.sum() / counts.sum()), list(ends[name]) if name in ends else None)
            for name, (values, counts) in columns.items()
            if counts.sum()
        }


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


def _columns(values: Sequence[Measured]) -> tuple[Column, Column]:
    table = np.array(values, dtype=np.float64)
    return table[:, 0], table[:, 1]


def _key(*parts: str) -> str:
    return "\n".join(parts)  # names have spaces, but no line ends
