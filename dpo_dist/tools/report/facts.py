"""Facts about a run for the verdict's rules, from metrics rows, summary, and findings about the data."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from dpo_dist.foundation import text
from dpo_dist.foundation.files import read_fields
from dpo_dist.foundation.text import without_secrets
from dpo_dist.foundation.types import Fields
from dpo_dist.kit import (
    ACCURACIES,
    KINDS,
    METRICS,
    PREFIX,
    LossKind,
    MetricsRow,
    RunFolder,
    finite,
    is_evaluation,
    loss_kinds,
    loss_unit,
)
from dpo_dist.tools.doctor.folder import DoctorFolder

MARGIN = "rewards/margins"


class Accuracy(NamedTuple):
    """An accuracy and its number of pairs, or an AUC and its number of records.

    `weight`: how many independent comparisons each pair or record is worth.
    """

    value: float
    pairs: int
    weight: float = 1.0

    @property
    def noise(self) -> float:
        """Three standard errors, with one right and one wrong pair added: few right pairs prove little."""
        share = (self.value * self.pairs + 1) / (self.pairs + 2)
        compared = self.pairs * self.weight
        return 3 * math.sqrt(share * (1 - share) / compared) if compared else math.inf


class RunFacts:
    """Metrics rows (null as nan), content of summary.json, and findings of doctor.json; any may be empty.

    `steps` are the rows of training steps. `evaluations` are the evaluations after a step, with keys without
    `eval_`. `last_rows` are the evaluations or, in a run without any, the steps; `part` names which. `unit`
    is "pair" or "record" (`loss_unit`). `accuracy_key` is the metric in `ACCURACIES` for that unit.
    """

    def __init__(self, rows: Sequence[MetricsRow], summary: Fields, findings: Sequence[Fields] = ()):
        self.rows = rows
        self.summary = summary
        self.data_findings = findings
        self.kinds = loss_kinds(summary.get("settings") or {})
        self.unit = loss_unit(self.kinds)
        self.has_scores = any(kind in KINDS and KINDS[LossKind(kind)].of_scores for kind in self.kinds)
        self.accuracy_key = ACCURACIES[self.unit == "record"]
        self.accuracy_title = METRICS[self.accuracy_key].title
        self.steps = [row for row in rows if "loss" in row]
        self.evaluations = [row for row in evaluation_rows(rows) if row["step"] > 0]
        self.last_rows = self.evaluations or self.steps
        self.part = "evaluation" if self.evaluations else "training"
        self.total_steps = int(summary.get("steps") or last(rows, "step") or 0)
        evaluated = last(self.evaluations, "pairs") or self.counts("eval").get("pairs", 0)
        self.evaluated_pairs = int(evaluated)  # of the last evaluation; 0 if unknown

    def setting(self, key: str) -> Any:
        """Return a setting of the run, or None if the summary does not name it."""
        return (self.summary.get("settings") or {}).get(key)

    def recent(self, metric: str) -> list[float]:
        """Return the values of a metric in the last quarter of the steps."""
        return [value for _, value in values(self.recent_rows(), metric)]

    def falls(self, rows: Sequence[MetricsRow]) -> list[tuple[float, float]] | None:
        """Return how far chosen responses' log-probs fell below the reference's, as (step, nats per token).

        Both models score the same responses. None if the policy does not start as the reference, or if
        rewards are not beta times a log-ratio.
        """
        beta = self.setting("loss.beta")
        has_reference = self.unit == "record" or any("rewards/both_fall" in row for row in self.rows)
        others = [self.setting("reference.path"), self.setting("reference.system")]
        reads_others = (self.summary.get("reference") or {}).get("reads_other_prompts")
        if not beta or not has_reference or others != [None, None] or reads_others:
            return None
        tokens = dict(values(rows, "tokens/chosen"))
        rewards = values(rows, "rewards/chosen")
        return [(step, -reward / beta / tokens[step]) for step, reward in rewards if tokens.get(step)] or None

    def chosen_logps(self) -> tuple[float, float] | None:
        """Return the log-prob per token of chosen responses under the reference, and at the end of the run.

        Both are from the last evaluation, else medians over the last quarter of the steps. Without a
        reference, the evaluation before the first step replaces it, or else the first row of a step.
        """
        key = "logps/chosen_per_token"
        rows = self.evaluations[-1:] or self.recent_rows()
        falls = self.falls(rows)
        ends = [value for _, value in values(rows, key)]
        if not ends:
            return None
        end = median(ends)
        if falls:
            return end + median(fall for _, fall in falls), end
        rows = evaluation_rows(self.rows) if self.evaluations else self.steps
        start = first(rows, key)
        return None if start is None else (start, end)

    def recent_rows(self) -> list[MetricsRow]:
        """Return the rows of the last quarter of the steps."""
        return [row for row in self.steps if row["step"] > 0.75 * self.total_steps]

    def counts(self, name: str) -> Fields:
        """Return the counts of the dataset `train` or `eval`; empty if unknown."""
        return (self.summary.get("data") or {}).get(name) or {}

    def label_share(self, name: str) -> float:
        """Return the share of good responses in `train` or `eval`; one half if it is not known."""
        labels = self.counts(name).get("labels") or {"good": 1, "bad": 1}
        return float(labels["good"] / (labels["good"] + labels["bad"]))

    def sources(self, name: str) -> dict[str, float]:
        """Return the share of pairs of each source of `train` or `eval` by "/label", and 1 for all by ""."""
        counts = Counter[str]()
        for source in self.counts(name).get("sources") or ():
            counts[f"/{source.get('label')}"] += source.get("pairs", 0)
        shares = {label: pairs / counts.total() for label, pairs in counts.items() if pairs}
        return {"": 1.0, **shares}

    def accuracy(self) -> Accuracy | None:
        """Return the accuracy of the last evaluation; without evaluations, `training_accuracy`."""
        return self.evaluation_accuracy() if self.evaluations else self.training_accuracy()

    def evaluation_accuracy(self, source: str = "", share: float = 1.0) -> Accuracy | None:
        """Return the accuracy of the last evaluation, or of one source in it (a key of `sources`)."""
        value = last(self.evaluations, self.accuracy_key + source)
        return self._accuracy(value, share * self.evaluated_pairs, "eval")

    def _accuracy(self, value: float | None, pairs: float, name: str) -> Accuracy | None:
        """Return an accuracy; of labelled records an AUC.

        An AUC's variance by chance is (n + 1) / (12 good bad), not 1 / 4n.
        """
        good = self.label_share(name)
        weight = 3 * good * (1 - good) if self.unit == "record" else 1.0
        return None if value is None else Accuracy(value, round(pairs), weight)

    def training_accuracy(self, source: str = "", share: float = 1.0) -> Accuracy | None:
        """Return the accuracy in the last quarter of the steps, else of the last step; None if unknown."""
        key = self.accuracy_key + source
        known = [row for row in self.steps if finite(row, key) is not None]
        recent = [row for row in known if row["step"] > 0.75 * self.total_steps] or known[-1:]
        pairs = sum(row.get("pairs", 0) for row in recent)
        return self._accuracy(mean(recent, key), share * pairs, "train")


def data_findings(folder: RunFolder) -> list[Fields]:
    """Return the doctor's findings about the data of a run, without secrets; none if it did not run."""
    report = DoctorFolder(folder.path).doctor_report
    content: Fields = without_secrets(read_fields(report)) if report.is_file() else {}
    return content.get("findings") or []


def evaluation_rows(rows: Iterable[MetricsRow]) -> list[MetricsRow]:
    """Return the rows of evaluations, including the one before the first step, with keys without `eval_`."""
    evaluations = filter(is_evaluation, rows)
    return [{key.removeprefix(PREFIX): value for key, value in row.items()} for row in evaluations]


def values(rows: Iterable[MetricsRow], key: str) -> list[tuple[float, float]]:
    """Return the step and value of every row whose `key` is finite."""
    return [(row["step"], row[key]) for row in rows if finite(row, key) is not None]


def first(rows: Sequence[MetricsRow], key: str) -> float | None:
    """Return the first finite value of `key`, or None."""
    return next((row[key] for row in rows if finite(row, key) is not None), None)


def last(rows: Sequence[MetricsRow], key: str) -> float | None:
    """Return the last finite value of `key`, or None."""
    return first(rows[::-1], key)


def mean(rows: Iterable[MetricsRow], key: str) -> float | None:
    """Return the mean of the finite values of `key` over the pairs of the rows, or None."""
    rows = [row for row in rows if finite(row, key) is not None]
    pairs = sum(row.get("pairs", 0) for row in rows)
    return sum(row[key] * row.get("pairs", 0) for row in rows) / pairs if pairs else None


def digits(value: float | None) -> str:
    """Return a number with three digits; "unknown" for None."""
    return "unknown" if value is None else text.number(value, 3)
