"""Facts of a run that the verdict's rules compare: metrics rows, summary, findings about the data."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_dist.config.losses import KINDS
from dpo_dist.foundation import text
from dpo_dist.foundation.errors import RunOutcome

Row = Mapping[str, float]
Side = Literal["chosen", "rejected"]
_EVALUATION = "eval_"
_LOSS = "loss"
ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"


@dataclass(frozen=True)
class Accuracy:
    """An accuracy and its number of pairs."""

    value: float
    pairs: int

    @property
    def noise(self) -> float:
        """Standard error of an accuracy of one half."""
        return 0.5 / math.sqrt(self.pairs) if self.pairs else math.inf


@dataclass(frozen=True)
class MovedLogps:
    """Log-probs of responses in nats per token, at the start and at the end.

    Attributes:
        is_of_same: whether they are of the same responses, those of the last row, under the reference and
            under the policy. Otherwise they are those of the first and the last training row.
    """

    start: float
    end: float
    is_of_same: bool


@dataclass(frozen=True)
class RunFacts:
    """Everything known of a run; any part may be empty.

    Attributes:
        rows: all metrics rows in their order.
        steps: rows of training steps.
        evaluations: rows of evaluations after a step, with keys without `eval_`.
        summary: the content of summary.json.
        data_findings: `findings` of doctor.json.
    """

    rows: Sequence[Row]
    steps: Sequence[Row]
    evaluations: Sequence[Row]
    summary: Mapping[str, Any]
    data_findings: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        summary: Mapping[str, Any],
        data_findings: Sequence[Mapping[str, Any]] = (),
    ) -> "RunFacts":
        """Return the facts of rows as in log_history.json (null as nan)."""
        evaluations = [row for row in evaluation_rows(rows) if row["step"] > 0]
        return cls(rows, [row for row in rows if _LOSS in row], evaluations, summary, data_findings)

    @property
    def last_rows(self) -> Sequence[Row]:
        """Evaluations, or the training steps of a run without."""
        return self.evaluations or self.steps

    @property
    def part(self) -> str:
        """Name of `last_rows`."""
        return "evaluation" if self.evaluations else "training"

    @property
    def total_steps(self) -> int:
        """Steps done."""
        return int(self.summary.get("steps") or (self.rows[-1]["step"] if self.rows else 0))

    def has_ended(self, fewest_steps: float) -> bool:
        """Return whether the run reached its last step and has at least so many steps."""
        is_cut = self.summary.get("exit") in (RunOutcome.preempted, RunOutcome.diverged)
        return self.total_steps >= fewest_steps and not is_cut

    def before(self, index: int) -> "RunFacts":
        """Return the facts of the rows before `rows[index]`."""
        summary = {**self.summary, "steps": int(self.rows[index]["step"])}
        return RunFacts.of(self.rows[:index], summary, self.data_findings)

    def setting(self, key: str) -> Any:
        """Return a setting of the run, or None if the summary does not name it."""
        return (self.summary.get("settings") or {}).get(key)

    @property
    def starts_as_reference(self) -> bool:
        """Whether rewards and margins start at 0: there is a reference, which is the policy's start."""
        kinds = [term.get("kind") for term in self.setting("loss.terms") or ()] or [self.setting("loss.kind")]
        has_reference = any(kind not in KINDS or KINDS[kind].needs_reference for kind in kinds)
        return (
            has_reference and not self.setting("loss.reference_free") and not self.setting("reference.path")
        )

    @property
    def evaluated_pairs(self) -> int:
        """Pairs of the last evaluation; 0 if unknown."""
        return int(last(self.evaluations, "pairs") or self.counts("eval").get("pairs", 0))

    def moved(self, metric: str) -> float | None:
        """Return the last value of a metric that starts at 0, or the change of it where it does not.

        It does not without a reference, or if that is another model than the policy's start. Then the change
        is that over training steps: an evaluation has other pairs, of which the first value can differ by
        more.
        """
        if self.starts_as_reference:
            return last(self.last_rows, metric)
        start, end = first(self.steps, metric), last(self.steps, metric)
        return None if start is None or end is None else end - start

    def falls(self, rows: Sequence[Row], side: Side = "chosen") -> list[tuple[float, float]] | None:
        """Return step and fall of the log-prob of responses below the reference's, in nats per token.

        Both models score the same responses. None if the policy does not start as the reference, or if the
        rewards are not beta times a log-ratio.

        Args:
            rows: of training steps, or evaluations.
            side: the responses.
        """
        beta = self.setting("loss.beta")
        if not beta or self.setting("reference.path") is not None:
            return None
        if not any("rewards/both_fall" in row for row in self.rows):  # of a run with a reference only
            return None
        tokens = dict(values(rows, f"tokens/{side}"))
        return [
            (step, -reward / beta / tokens[step])
            for step, reward in values(rows, f"rewards/{side}")
            if tokens.get(step)
        ] or None

    def moved_logps(self, side: Side) -> MovedLogps | None:
        """Return the log-probs of the chosen or the rejected responses before and after training.

        None if they were not measured.
        """
        metric, falls = f"logps/{side}_per_token", self.falls(self.last_rows, side)
        rows = self.steps if falls is None else self.last_rows
        start, end = first(rows, metric), last(rows, metric)
        if start is None or end is None:
            return None
        return MovedLogps(start if falls is None else end + falls[-1][1], end, falls is not None)

    def counts(self, name: str) -> Mapping[str, Any]:
        """Return the counts of the dataset `train` or `eval`; empty if unknown."""
        return (self.summary.get("data") or {}).get(name) or {}

    def pairs_of_labels(self, name: str) -> dict[str, int]:
        """Return the pairs of each label of the sources of `train` or `eval`; empty if unknown."""
        found: dict[str, int] = {}
        for source in self.counts(name).get("sources") or ():
            label = source.get("label")
            if label is not None:  # older summaries have none
                found[label] = found.get(label, 0) + source.get("pairs", 0)
        return found

    def accuracy(self) -> Accuracy | None:
        """Return the accuracy of the last evaluation; without evaluations `training_accuracy`."""
        if not self.evaluations:
            return self.training_accuracy()
        value = last(self.evaluations, ACCURACY)
        return None if value is None else Accuracy(value, self.evaluated_pairs)

    def training_accuracy(self) -> Accuracy | None:
        """Return the accuracy of the last quarter of the steps, or None if it was not measured."""
        measured = [row for row in self.steps if finite(row, ACCURACY) is not None]
        recent = [row for row in measured if row["step"] > 0.75 * self.total_steps] or measured[-1:]
        return _accuracy_of(recent, ACCURACY, 1.0)

    def evaluated_sources(self) -> dict[str, Accuracy]:
        """Return the last evaluation accuracy of each source; empty if there is only one."""
        found = {}
        for label, pairs in self.pairs_of_labels("eval").items():
            value = last(self.evaluations, f"{ACCURACY}/{label}")
            if value is not None and pairs:
                found[label] = Accuracy(value, pairs)
        return found

    def unseen_sources(self) -> dict[str, Accuracy]:
        """Return the training accuracy of each source in the second half of the first epoch.

        Later the policy has seen the pairs, and fits noise too. The number of pairs is the source's share.
        """
        first_epoch = [row for row in self.steps if row.get("epoch", 0.0) < 1]
        late = [row for row in first_epoch if row["step"] > first_epoch[-1]["step"] / 2]
        whole = self.counts("train").get("pairs") or 1
        found = {}
        for label, pairs in self.pairs_of_labels("train").items():
            accuracy = _accuracy_of(late, f"{ACCURACY}/{label}", pairs / whole)
            if accuracy is not None and accuracy.pairs:
                found[label] = accuracy
        return found


def evaluation_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of evaluations, also of that before the first step, with keys without `eval_`."""
    return [
        {key.removeprefix(_EVALUATION): value for key, value in row.items()}
        for row in rows
        if f"{_EVALUATION}{_LOSS}" in row
    ]


def _accuracy_of(rows: Iterable[Row], metric: str, share: float) -> Accuracy | None:
    """Return the mean of rows, of a share of their pairs; None if it was not measured."""
    measured = [row for row in rows if finite(row, metric) is not None]
    pairs = sum(row.get("pairs", 0) for row in measured)
    value = mean(measured, metric)
    return None if value is None else Accuracy(value, int(pairs * share))


def finite(row: Row, key: str) -> float | None:
    """Return the value of a row, or None if it is missing or not finite."""
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def pooled(
    rows: Iterable[Row], key: str, fewest_pairs: float, share: float = 1.0
) -> list[tuple[float, float]]:
    """Return the means of `key` over successive rows with at least so many pairs, with the last row's step.

    The value of a few pairs is noise.

    Args:
        rows: of training steps.
        key: of a mean over pairs; rows without a finite value are not counted.
        fewest_pairs: of each mean; a rest with fewer is not returned.
        share: of the pairs of a row that the metric is about.
    """
    found, total, pairs = [], 0.0, 0.0
    for row in rows:
        if finite(row, key) is None:
            continue
        total += row[key] * row.get("pairs", 0)
        pairs += row.get("pairs", 0)
        if pairs and share * pairs >= fewest_pairs:
            found.append((row["step"], total / pairs))
            total, pairs = 0.0, 0.0
    return found


def values(rows: Iterable[Row], key: str) -> list[tuple[float, float]]:
    """Return step and value of every row with a finite value of `key`."""
    return [(row["step"], row[key]) for row in rows if finite(row, key) is not None]


def first(rows: Sequence[Row], key: str) -> float | None:
    """Return the first finite value of `key`, or None."""
    found = values(rows, key)
    return found[0][1] if found else None


def last(rows: Sequence[Row], key: str) -> float | None:
    """Return the last finite value of `key`, or None."""
    found = values(rows, key)
    return found[-1][1] if found else None


def mean(rows: Iterable[Row], key: str) -> float | None:
    """Return the mean of the finite values of `key` over the pairs of the rows, or None."""
    found = [(row[key], row.get("pairs", 0)) for row in rows if finite(row, key) is not None]
    pairs = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / pairs if pairs else None


def mean_over_time(rows: Iterable[Row], key: str) -> float | None:
    """Return the mean of a rate, such as pairs per second, over the time of the training steps, or None."""
    total, seconds, before = 0.0, 0.0, 0.0
    for row in rows:
        if "step_seconds" not in row:  # an evaluation
            continue
        value, spent = finite(row, key), row["step_seconds"] * (row["step"] - before)
        before = row["step"]
        if value is not None:
            total, seconds = total + value * spent, seconds + spent
    return total / seconds if seconds else None


def number(value: float | None) -> str:
    """Return three digits of a number for people; "unknown" of None."""
    return "unknown" if value is None else text.number(value, 3)
