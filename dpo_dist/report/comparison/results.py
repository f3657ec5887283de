"""Results of a comparison, read from `comparison.json`."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_dist.errors import DataError
from dpo_dist.secret_text import without_secrets

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
