"""The progress of a run, which every checkpoint has, and `run_state.json`."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.config.identity import run_digest
from dpo_dist.config.losses import BcoDelta, LossConfig
from dpo_dist.config.run_folder import STATE, RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.zero import LossScale
from dpo_dist.foundation.errors import CheckpointError, RunOutcome, first_line
from dpo_dist.foundation.files import read_small, write_text
from dpo_dist.insight.metrics.log import Work
from dpo_dist.model.flops import PeakFlops
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.objective.metrics import BATCH_MARGIN, BATCH_REWARD, metric_means
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.schedule import as_text


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


@dataclass
class WorkTime:
    """The time of a run so far; part of every checkpoint.

    Attributes:
        seconds: by kind of work, of all starts. Every moment of a start counts as one kind.
        device_seconds: the same in all, times the processes of each start.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    device_seconds: float = 0.0

    def add(self, work: str, seconds: float, processes: int) -> None:
        """Add the time that all processes spent on a kind of work."""
        self.seconds[work] = self.seconds.get(work, 0.0) + seconds
        self.device_seconds += seconds * processes

    def as_dict(self) -> dict[str, Any]:
        """Return the section `work` of summary.json."""
        return {
            "seconds": {work: round(seconds, 3) for work, seconds in self.seconds.items()},
            "device_seconds": round(self.device_seconds, 3),
        }


class WorkClock:
    """Clock of one start, which begins with the work `starting`.

    Args:
        processes: of the run.
        started: the time of the start, by `time.monotonic`.
    """

    def __init__(self, processes: int, started: float):
        self._processes, self._marked = processes, started
        self._work: Work = "starting"
        self._spent = WorkTime()

    def resume(self, former: WorkTime) -> None:
        """Continue the time of the starts before."""
        for work, seconds in self._spent.seconds.items():
            former.add(work, seconds, self._processes)
        self._spent = former

    def enter(self, work: Work) -> None:
        """Count the time from now on as `work`."""
        now = time.monotonic()
        self._spent.add(self._work, now - self._marked, self._processes)
        self._work, self._marked = work, now

    @contextlib.contextmanager
    def of(self, work: Work) -> Iterator[None]:
        """Count the time of the block as `work`, also where it is part of another work."""
        outer = self._work
        self.enter(work)
        try:
            yield
        finally:
            self.enter(outer)

    def read(self) -> WorkTime:
        """Return the time until now, which a later call changes."""
        self.enter(self._work)
        return self._spent


_KEPT = (
    "step",
    "pairs_seen",
    "train_seconds",
    "reference_report",
    "bad_steps",
    "bad_in_a_row",
    "collapsed_in_a_row",
    "overflows",
    "owes_evaluation",
)
"""Plain values of `Position` in a checkpoint's state."""


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
            kept = {name: state[name] for name in _KEPT}
            scale = state["loss_scale"]
            return cls(
                **kept,
                running=RunningMeans(**state["running"]),
                window=LogWindow(**state["window"]),
                work=WorkTime(**state["work"]),
                loss_scale=None if scale is None else LossScale(**scale),
                best=[BestCheckpoint(**one) for one in state["best"]],
            )
        except (LookupError, TypeError) as error:
            raise CheckpointError(
                "the state of the checkpoint cannot be read",
                where=STATE,
                got=first_line(error),
                remedy="restore the checkpoint, or delete it to resume from the one before",
            ) from error

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


Identity = dict[str, str | None]

_NAMES = {
    "data": "training data",
    "eval_data": "evaluation data",
    "model": "model that the policy starts from",
    "reference": "reference model",
}
_LENGTH = "length"
"""Part of the configuration's digest; a run may be continued to a greater one."""
# By the names of `Inputs.named`.
_DATA = {"data": "train", "eval_data": "eval"}


@dataclass(frozen=True)
class RunState:
    """Content of the state file.

    Attributes:
        outcome: of the run so far.
        step: the number of steps done; with `started` and `diverged`, at the last checkpoint.
        identity: digests of all inputs that decide the result.
        summary: content of summary.json with `exported`, else None.
        stopped_by: the reasons of a stop: signals, limits, the tracker; None with another outcome.
    """

    outcome: RunOutcome
    step: int
    identity: Identity
    summary: dict[str, Any] | None = None
    stopped_by: str | None = None


def read_state(folder: RunFolder) -> RunState | None:
    """Return the recorded state of the run in `folder`; None if there is none.

    Raises:
        CheckpointError: the file cannot be read or was changed.
    """
    file = folder.state
    try:
        content = json.loads(read_small(file))
        state = RunState(**{**content, "outcome": RunOutcome(content["outcome"])})
        if not isinstance(state.step, int) or not isinstance(state.identity, dict):
            raise TypeError("step must be a number, and identity a mapping of names to digests")
        return state
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            "the state of this run cannot be read",
            where=str(file),
            got=f"{type(error).__name__}: {error}",
            remedy="restore the file, or delete it to resume from the last checkpoint",
        ) from error


def write_state(folder: RunFolder, state: RunState) -> None:
    """Write the state file whole."""
    write_text(folder.state, json.dumps(asdict(state), indent=1) + "\n")


def check_no_progress(state: RunState | None, folder: RunFolder) -> None:
    """Check, where no checkpoint is found, that none was saved.

    Raises:
        CheckpointError: one was; its disk may not be mounted.
    """
    if state is None or state.step == 0:
        return
    raise CheckpointError(
        f"this run has done {state.step:,} steps, and its checkpoints are missing",
        where=str(folder.checkpoints),
        got=f"no checkpoint, and the state {state.outcome} after step {state.step:,} in {folder.state.name}",
        remedy=f"put the checkpoints back, or mount their disk; to train from the beginning, delete "
        f"{folder.state.name}, or set another run.dir",
    )


def identify(config: RunConfig, inputs: Inputs) -> Identity:
    """Return the digests of all inputs that decide a run's result."""
    return {
        "run_digest": run_digest(config),
        "data": inputs.train_set.fingerprint,
        "eval_data": inputs.eval_set.fingerprint if inputs.eval_set is not None else None,
        "model": inputs.policy_files.digest,
        "reference": inputs.reference_files.digest if inputs.reference_files is not None else None,
        _LENGTH: as_text(config),
    }


def check_identity(
    recorded: Mapping[str, Any], identity: Identity, where: Path, datasets: Mapping[str, PreferenceDataset]
) -> None:
    """Check that the inputs of a run have not changed.

    Args:
        recorded: the state of a checkpoint, or the identity in the state file.
        identity: of this start.
        where: the file or folder with `recorded`.
        datasets: `Inputs.named`; an earlier version may have encoded the same examples into other folders.

    Raises:
        CheckpointError: files that the configuration names have changed.
    """
    for name, digest in identity.items():
        former = recorded.get(name)
        dataset = datasets.get(_DATA.get(name, ""))
        if name in (_LENGTH, "run_digest"):  # of `check_configuration`
            continue
        if former == digest:
            continue
        also = (
            " (also those of the tokenizer; after an update of this program those in data.cache)"
            if dataset
            else ""
        )
        raise CheckpointError(
            f"the {_NAMES[name]} of this run changed since it was last saved",
            where=str(where),
            got=f"digest {digest}",
            expected=f"digest {former}",
            remedy=f"restore the former files{also}, or start a new run with another run.dir",
        )
