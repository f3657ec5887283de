"""Metrics of the steps between two logged rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.model.flops import PeakFlops
from dpo_dist.objective.metrics import metric_means


@dataclass(frozen=True)
class StepMeasures:
    """The measures of one optimizer step over its global batch.

    Attributes:
        sums: sum over the global batch by metric name.
        counts: count of each metric: pairs, or a count of its own.
        values: one value for the step by name: gradient norm, loss parameters that change, `time/*`.
        learning_rate: of this step.
        pairs: in the global batch.
        tokens: unique tokens computed.
        flops: useful operations of the step on all ranks.
        seconds: wall-clock time.
    """

    sums: Mapping[str, float]
    counts: Mapping[str, float]
    values: Mapping[str, float]
    learning_rate: float
    pairs: int
    tokens: int
    flops: float
    seconds: float


@dataclass
class LogWindow:
    """Sums over the steps since the last logged row.

    A row of `trainer.log_every` steps has exact means over all pairs of these steps. The sums are part of
    every checkpoint, so that a resumed run writes the same rows.
    """

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    pairs: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "LogWindow":
        """Return the window in a checkpoint's state; older ones have one count of pairs for all metrics."""
        if "pair_count" not in state:
            return cls(**state)
        state = dict(state)
        sums, count = state.pop("pair_sums"), state.pop("pair_count")
        return cls(**state, sums=sums, counts=dict.fromkeys(sums, count))

    def add(self, step: StepMeasures) -> None:
        """Add one step."""
        _add(self.sums, step.sums)
        _add(self.counts, step.counts)
        _add(self.values, step.values)
        self.steps += 1
        self.learning_rate = step.learning_rate
        self.pairs += step.pairs
        self.tokens += step.tokens
        self.flops += step.flops
        self.seconds += step.seconds

    def row(self, peaks: PeakFlops) -> dict[str, float]:
        """Return one row of the metrics log, without `step` and `epoch`.

        Metrics are means over their counts (pairs, tokens), values of a step and `step_seconds` means over
        steps, pairs and tokens totals; the learning rate is that of the last step.
        """
        row = metric_means(self.sums, self.counts)
        row |= {name: total / self.steps for name, total in self.values.items()}
        row["learning_rate"] = self.learning_rate
        row |= throughput(self.pairs, self.tokens, self.seconds)
        row["step_seconds"] = self.seconds / self.steps
        row["mfu"] = self.flops / self.seconds / peaks.measured
        if peaks.datasheet is not None:
            row["mfu/datasheet"] = self.flops / self.seconds / peaks.datasheet
        return row


def throughput(pairs: int, tokens: int, seconds: float) -> dict[str, float]:
    """Return the columns of a metrics row for amounts and speed."""
    return {
        "pairs": pairs,
        "tokens": tokens,
        "step_seconds": seconds,
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": tokens / seconds,
    }


def _add(totals: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value
