"""Steps, evaluations and checkpoints in their order, on every rank alike."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_dist.config.loss_kinds import BcoDelta
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.collate import RankBatch, shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.micro_batches import ComputeCosts
from dpo_dist.data.sampler import BatchSampler, Indices
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.signals import StopRequest
from dpo_dist.distributed.world import World
from dpo_dist.errors import DivergedError
from dpo_dist.model.flops import PeakFlops, StepFlops
from dpo_dist.objective.metrics import BATCH_MARGIN, BATCH_REWARD, MetricSums, metric_means
from dpo_dist.objective.running_stats import RunningMeans
from dpo_dist.prefetch import prefetch
from dpo_dist.report.console import Console
from dpo_dist.report.recorder import Recorder
from dpo_dist.training.learning_rate import learning_rate
from dpo_dist.training.log_window import LogWindow, StepMeasures, throughput
from dpo_dist.training.step import Objective, ReadyStep, evaluate, train_step
from dpo_dist.training.step_timer import StepClock

_STEPS_AHEAD = 2


@dataclass
class Position:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    pairs_seen: int = 0
    train_seconds: float = 0.0
    running: RunningMeans = field(default_factory=RunningMeans)
    window: LogWindow = field(default_factory=LogWindow)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Position":
        """The position that a checkpoint's state tells of."""
        return cls(
            step=state["step"],
            pairs_seen=state["pairs_seen"],
            train_seconds=state["train_seconds"],
            running=RunningMeans(**state["running"]),
            window=LogWindow.of(state["window"]),
        )


@dataclass(frozen=True)
class Loop:
    """Everything that the steps of one run need, wired by `assemble`.

    `flops` are the operations of a step, and `peaks` those that all devices could do in a second.
    `reference_sync` is there where the reference follows the policy, `recorder` on rank 0 only. `identity`
    goes into checkpoints, to tell whose they are.
    `stop_wanted` is asked after every step; one rank's yes ends the run on all after a checkpoint.
    """

    config: RunConfig
    world: World
    policy: PolicyEngine
    flops: StepFlops
    peaks: PeakFlops
    objective: Objective
    reference_sync: ReferenceSync | None
    sampler: BatchSampler
    train_set: PreferenceDataset
    eval_set: PreferenceDataset | None
    costs: ComputeCosts
    recorder: Recorder | None
    console: Console
    checkpoints: CheckpointSaver
    identity: dict[str, Any]
    stop_wanted: StopRequest

    def run(self, position: Position) -> bool:
        """Train on from `position` to the end of the schedule; collective.

        Returns:
            Whether the end was reached; False if the run was asked to stop before, with a checkpoint saved.

        Raises:
            DivergedError: loss or gradient stopped being finite.
        """
        trainer, steps = self.config.trainer, self.sampler.steps
        if self.eval_set is not None and trainer.eval_at_start and position.step == 0:
            self._record(self._evaluate(self.eval_set, position))
        with (
            self.console.bar("train", steps, position.step, "step") as bar,
            prefetch(self._ready_steps(position.step), _STEPS_AHEAD) as ready_steps,
        ):
            while position.step < steps:
                measures, asked_to_stop = self._step(position, ready_steps)
                bar.set_postfix(_postfix(measures), refresh=False)
                bar.update()
                done = position.step
                if done == steps or _is_due(done, trainer.log_every):
                    self._record_window(position)
                if self.eval_set is not None and (done == steps or _is_due(done, trainer.eval_every)):
                    self._record(self._evaluate(self.eval_set, position))
                if done == steps or asked_to_stop or _is_due(done, trainer.save_every):
                    self._save(position)
                if asked_to_stop and done < steps:
                    break
        self.checkpoints.commit()
        return position.step == steps

    def _ready_steps(self, first: int) -> Iterator[ReadyStep]:
        """Every step from `first` on; made ahead of training, in another thread."""
        for step in range(first, self.sampler.steps):
            plan = self._plan(self.train_set, self.sampler.indices(step))
            yield self.objective.ready_step(plan, self.world.device)

    def _step(self, position: Position, ready_steps: Iterator[ReadyStep]) -> tuple[StepMeasures, bool]:
        """Train one step; no wait for the device but DeepSpeed's before its update and the sum over ranks."""
        clock = StepClock(self.world.device)
        clock.enter("data")
        ready, step = next(ready_steps), position.step
        plan = ready.plan
        rate = learning_rate(self.config.optim, step, self.sampler.steps)
        metrics, norm = train_step(
            self.policy, self.objective, ready, rate, self.world, clock, position.running
        )
        if self.reference_sync is not None:
            self.reference_sync.after_step(step + 1)
        votes = [self.stop_wanted.vote(self.world.is_main), self.checkpoints.is_ready]
        sums, counts, (for_stopping, for_committing), grad_norm = self._reduce(metrics, votes, norm)
        if for_committing == self.world.size:
            clock.enter("checkpoint")
            self.checkpoints.commit()
            clock.enter("other")
        means = metric_means(sums, counts)
        running = self._running_values(means, position, plan.pairs)
        times = {f"time/{phase}": seconds for phase, seconds in clock.stop().items()}
        measures = StepMeasures(
            sums=sums,
            counts=counts,
            values={**running, "grad_norm": grad_norm, **times},
            learning_rate=rate,
            pairs=plan.pairs,
            tokens=plan.tokens,
            flops=self.flops.of(plan.tokens, plan.targets, plan.attended),
            seconds=sum(times.values()),
        )
        position.step += 1
        position.pairs_seen += plan.pairs
        position.train_seconds += measures.seconds
        position.window.add(measures)
        if not (math.isfinite(grad_norm) and math.isfinite(means["loss"])):
            self._record_window(position)
            self.checkpoints.commit()
            raise DivergedError(
                f"loss or gradient is not finite at step {position.step}; this update was not applied",
                got=f"loss {means['loss']}, gradient norm {grad_norm}",
                remedy="lower optim.lr or raise its warm-up, and look at the pairs of this step; "
                "the checkpoints before it are whole",
            )
        return measures, for_stopping > 0

    def _record_window(self, position: Position) -> None:
        """Record one row for the steps since the last one."""
        row = {
            "step": position.step,
            "epoch": self.sampler.epoch(position.step - 1),
            **position.window.row(self.peaks),
        }
        if self.world.device.type == "cuda":
            row["memory/peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        self._record(row)
        position.window = LogWindow()

    def _running_values(
        self, metrics: Mapping[str, float], position: Position, pairs: int
    ) -> dict[str, float]:
        """Return the loss parameters that follow from the steps before; add this step to `position`."""
        loss, before = self.config.loss, position.running
        row = {}
        if BATCH_MARGIN in metrics:
            row["loss/beta"] = before.batch_beta(loss, metrics[BATCH_MARGIN])
        if loss.bco_delta is BcoDelta.running_mean:
            row["loss/delta"] = before.reward
        if row:
            margin, reward = metrics.get(BATCH_MARGIN, 0.0), metrics.get(BATCH_REWARD, 0.0)
            position.running = before.after(loss, margin, reward, pairs)
        return row

    def _plan(self, dataset: PreferenceDataset, rows: Indices) -> RankBatch:
        budget, only_chosen = self.config.trainer.micro_batch_tokens, self.config.loss.is_one_sided
        return shard_batch(dataset, rows, self.world.rank, self.world.size, budget, self.costs, only_chosen)

    def _reduce(
        self, sums: MetricSums, votes: Sequence[bool], grad_norm: Tensor
    ) -> tuple[dict[str, float], dict[str, float], list[int], float]:
        """Return sums and counts of the metrics over the global batch, votes and the gradient norm.

        One all-reduce for sums and votes, then one device-to-host copy of all three.
        """
        cast = torch.tensor(votes, dtype=sums.values.dtype).to(sums.values.device, non_blocking=True)
        total = self.world.sum(torch.cat((sums.values, cast)))
        on_host = torch.cat((total, grad_norm.double().view(1))).cpu()
        *reduced, norm = on_host.tolist()
        return *sums.named(reduced), [round(vote) for vote in reduced[len(sums.values) :]], norm

    def _evaluate(self, dataset: PreferenceDataset, position: Position) -> dict[str, float]:
        started = time.monotonic()
        plan = self._plan(dataset, np.arange(len(dataset), dtype=np.int64))
        sums = evaluate(self.policy, self.objective, plan, self.world, position.running)
        metrics = MetricSums(sums.names, self.world.sum(sums.values)).means()
        measured = {**metrics, **throughput(plan.pairs, plan.tokens, time.monotonic() - started)}
        row = {f"eval_{name}": value for name, value in measured.items()}
        return {"step": position.step, "epoch": self.sampler.epoch(position.step - 1), **row}

    def _record(self, row: dict[str, float]) -> None:
        if self.recorder is not None:
            self.recorder.record(row)

    def _save(self, position: Position) -> None:
        if self.recorder is not None:
            self.recorder.metrics.save()
        self.checkpoints.save(
            position.step, {**asdict(position), **self.identity, "steps": self.sampler.steps}
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _postfix(step: StepMeasures) -> dict[str, str]:
    means = step.means()
    return {
        "loss": f"{means['loss']:.4f}",
        **({"acc": f"{means['rewards/accuracies']:.2f}"} if "rewards/accuracies" in means else {}),
        "pairs/s": f"{step.pairs / step.seconds:.1f}",
    }
