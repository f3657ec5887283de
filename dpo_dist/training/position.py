"""The progress of a run, which every checkpoint has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.config.checkpoint_folders import STATE
from dpo_dist.config.loss_kinds import BcoDelta, LossConfig
from dpo_dist.distributed.loss_scale import LossScale
from dpo_dist.errors import CheckpointError, first_line
from dpo_dist.objective.metrics import BATCH_MARGIN, BATCH_REWARD
from dpo_dist.objective.running_stats import RunningMeans
from dpo_dist.training.log_window import LogWindow
from dpo_dist.training.work_clock import WorkTime

_COUNTS = ("step", "pairs_seen", "steps", "bad_steps", "bad_in_a_row", "collapsed_in_a_row", "overflows")
_MOST = 2**48


@dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint that is kept for the value of an evaluation metric."""

    metric: str
    step: int
    value: float


@dataclass
class Position:
    """The progress of a run; part of every checkpoint.

    Attributes:
        reference_report: the section `reference` of summary.json, of all starts.
        work: time of all starts.
        bad_steps: number of steps that were skipped because loss or gradient was not finite.
        bad_in_a_row: of these, the last ones without another step between them.
        collapsed_in_a_row: last steps of a policy that has collapsed.
        overflows: number of steps that were skipped because gradients in fp16 were too large for their scale.
        loss_scale: of the next step in fp16, set before it is saved; None with another `model.dtype`.
        best: the best checkpoints by `trainer.keep_best`, the best first.
        owes_evaluation: the run was stopped before the evaluation of its last step was complete.
    """

    step: int = 0
    pairs_seen: int = 0
    train_seconds: float = 0.0
    running: RunningMeans = field(default_factory=RunningMeans)
    window: LogWindow = field(default_factory=LogWindow)
    reference_report: dict[str, Any] = field(default_factory=dict)
    work: WorkTime = field(default_factory=WorkTime)
    bad_steps: int = 0
    bad_in_a_row: int = 0
    collapsed_in_a_row: int = 0
    overflows: int = 0
    loss_scale: LossScale | None = None
    best: list[BestCheckpoint] = field(default_factory=list)
    owes_evaluation: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Position":
        """Return the position in a checkpoint's state.

        Raises:
            CheckpointError: it has no position.
        """
        try:
            return cls._of(state)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                "the state of the checkpoint cannot be read",
                where=STATE,
                got=first_line(error),
                remedy="restore the checkpoint, or delete it to resume from the one before",
            ) from error

    @classmethod
    def _of(cls, state: Mapping[str, Any]) -> "Position":
        _check_types(state)
        return cls(
            step=state["step"],
            pairs_seen=state["pairs_seen"],
            train_seconds=state["train_seconds"],
            running=RunningMeans(**state["running"]),
            window=LogWindow.of(state["window"]),
            reference_report=state.get("reference_report", {}),  # older ones have none
            work=WorkTime.of(state),
            bad_steps=state.get("bad_steps", 0),
            bad_in_a_row=state.get("bad_in_a_row", 0),
            collapsed_in_a_row=state.get("collapsed_in_a_row", 0),
            overflows=state.get("overflows", 0),
            loss_scale=LossScale(**scale) if (scale := state.get("loss_scale")) else None,
            best=[BestCheckpoint(**one) for one in state.get("best", [])],
            owes_evaluation=state.get("owes_evaluation", False),
        )

    @property
    def is_best(self) -> bool:
        """Whether the checkpoint of this step is one of the best."""
        return any(one.step == self.step for one in self.best)

    def add_running(self, loss: LossConfig, means: Mapping[str, float], pairs: int) -> dict[str, float]:
        """Add a step to `running`, and return the loss parameters that it had from the steps before.

        Args:
            loss: settings.
            means: of the step's metrics.
            pairs: of the step.
        """
        row = {}
        if BATCH_MARGIN in means:
            row["loss/beta"] = self.running.batch_beta(loss, means[BATCH_MARGIN])
        if loss.bco_delta is BcoDelta.running_mean:
            row["loss/delta"] = self.running.reward
        if row:
            margin, reward = means.get(BATCH_MARGIN, 0.0), means.get(BATCH_REWARD, 0.0)
            self.running = self.running.after(loss, margin, reward, pairs)
        return row


def _check_types(state: Mapping[str, Any]) -> None:
    """Check the types of a checkpoint's values, which another program may have written.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: one has another type, or `step` or `pairs_seen` is
            missing.
    """
    counts = {"step": state["step"], "pairs_seen": state["pairs_seen"]}
    counts |= {name: state[name] for name in _COUNTS if state.get(name) is not None}
    best, report = state.get("best", []), state.get("reference_report", {})
    counts |= {f"best[{number}].step": one["step"] for number, one in enumerate(best)}
    for name, value in counts.items():
        if not isinstance(value, int) or not 0 <= value < _MOST:
            raise ValueError(f"{name} is no count")
    numbers = {name: state[name] for name in ("train_seconds", "running", "window")}
    numbers["loss_scale"] = state.get("loss_scale")
    numbers |= {"work": state.get("work", {}), "best": [one["value"] for one in best]}
    if report:
        numbers["reference_report"] = [report[name] for name in ("hits", "computed", "seconds")]
    for name, value in numbers.items():
        if not _is_of_numbers(value):
            raise ValueError(f"{name} has a value that is no number")
    texts = [*report.get("damaged", []), *(one["metric"] for one in best), state.get("length") or ""]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name is no text")


def _is_of_numbers(value: Any) -> bool:
    """Return whether a value is a number or None, or consists of such."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return (
        value is None or isinstance(value, int | float) if parts is None else all(map(_is_of_numbers, parts))
    )
