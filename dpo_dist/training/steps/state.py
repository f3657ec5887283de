"""A run's progress, which every checkpoint has: position, sums since the last row, health, best step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import TypeAdapter

from dpo_dist.config.losses import LossConfig
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.objective.metrics import BATCH_MARGIN, BATCH_REWARD, metric_means


@dataclass
class LogWindow:
    """Sums over one step, or over the steps since the last metrics row."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # by metric, as `counts`
    counts: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)  # gradient norm, changing loss parameters
    learning_rate: float = 0.0  # of the last step
    pairs: int = 0
    tokens: int = 0  # computed tokens; a shared prompt counts once
    flops: float = 0.0  # of all ranks, without recomputation
    seconds: float = 0.0

    def add(self, other: "LogWindow") -> None:
        """Add the sums of later steps."""
        for totals in ("sums", "counts", "values"):
            mine = getattr(self, totals)
            for name, value in getattr(other, totals).items():
                mine[name] = mine.get(name, 0.0) + value
        for total in ("steps", "pairs", "tokens", "flops", "seconds"):
            setattr(self, total, getattr(self, total) + getattr(other, total))
        self.learning_rate = other.learning_rate

    def row(self, peak: float) -> dict[str, float]:
        """Return a metrics row, without `step` and `epoch`.

        Metrics are means over their counts (pairs, tokens); `values` and `step_seconds` are means over steps;
        pairs and tokens are totals.
        """
        return {
            **metric_means(self.sums, self.counts),
            **{name: total / self.steps for name, total in self.values.items()},
            "learning_rate": self.learning_rate,
            **throughput(self.pairs, self.tokens, self.seconds),
            "step_seconds": self.seconds / self.steps,
            "mfu": self.flops / self.seconds / peak,
        }


def throughput(pairs: int, tokens: int, seconds: float) -> dict[str, float]:
    """Return a metrics row's columns for amounts and speed."""
    return {
        "pairs": pairs,
        "tokens": tokens,
        "step_seconds": seconds,
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": tokens / seconds,
    }


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the best value of an evaluation metric."""

    metric: str
    step: int
    value: float


@dataclass
class Health:
    """Numbers of steps that changed no weight or learnt nothing."""

    bad_steps: int = 0  # skipped because loss or gradient was not finite
    bad_in_a_row: int = 0  # bad steps since the last good one
    without_gradient: int = 0  # steps whose gradient was exactly 0
    without_gradient_in_a_row: int = 0  # the last ones of them, unless all pairs satisfied the loss
    overflows: int = 0  # skipped because fp16 gradients were too large for the loss scale


@dataclass
class Position:
    """The progress of a run; part of every checkpoint."""

    step: int = 0
    pairs_seen: int = 0
    train_seconds: float = 0.0
    evaluation_is_due: bool = False  # stopped before the evaluation of the last step was complete
    running: RunningMeans = field(default_factory=RunningMeans)  # used by some losses
    window: LogWindow = field(default_factory=LogWindow)  # since the last metrics row
    health: Health = field(default_factory=Health)
    best: BestCheckpoint | None = None  # by `trainer.keep_best`, after the first evaluation
    stale_evaluations: int = 0  # evaluations since that of `best`

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Position":
        """Return the position that a checkpoint's state has."""
        return TypeAdapter(cls).validate_python({field.name: state[field.name] for field in fields(cls)})

    @property
    def best_step(self) -> int | None:
        """The best checkpoint's step."""
        return None if self.best is None else self.best.step

    def add_running(self, loss: LossConfig, means: Mapping[str, float], pairs: int) -> dict[str, float]:
        """Add a step to `running`; return the step's loss parameters, which depend on earlier steps."""
        row = {}
        if BATCH_MARGIN in means:
            row["loss/beta"] = self.running.batch_beta(loss, means[BATCH_MARGIN])
        if loss.has_running_reward:
            row["loss/delta"] = self.running.reward
        if row:
            margin = means.get(BATCH_MARGIN, 0.0)
            reward = means.get(BATCH_REWARD, 0.0)
            self.running = self.running.after(loss, margin, reward, pairs)
        return row
