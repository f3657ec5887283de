"""The training loop: steps, evaluations, metrics rows and checkpoints, in the same order on all ranks."""

import contextlib
import difflib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dpo_dist.config.metrics import PREFIX
from dpo_dist.config.rules import direction_of
from dpo_dist.config.run_folder import LAST_EVALUATION, checkpoint_name
from dpo_dist.config.schema import Direction, RunConfig, TrainerConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.checkpoint import CheckpointSaver, has_all_files
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.world import GivenWay
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.process import prefetch
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import Row
from dpo_dist.insight.metrics.trackers import Margins
from dpo_dist.insight.recorder import Recorder, spared
from dpo_dist.insight.verdict.facts import usual_loss
from dpo_dist.objective.metrics import MARGIN_PERCENTILES, MetricPlan, PairValues
from dpo_dist.training.evaluate import write_evaluation
from dpo_dist.training.guards import (
    count,
    ending_error,
    is_bad,
    is_overflow,
    pair_losses,
    write_bad_step,
)
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.loss import Objective, ReadyStep
from dpo_dist.training.resume import Identity
from dpo_dist.training.samples import Samples
from dpo_dist.training.schedule import learning_rate
from dpo_dist.training.start import Run
from dpo_dist.training.state import BestCheckpoint, LogWindow, Position, throughput
from dpo_dist.training.step import StepClock, StepTotals, evaluate, reduce_step, train_step


class Progress:
    """Shows the steps of one start of a run of `steps`; the first and the last one always."""

    def __init__(self, console: Console, steps: int, peak: float, device: torch.device):
        self._console, self._steps, self._peak, self._device = console, steps, peak, device
        self._window = LogWindow()
        self._first: tuple[int, float] | None = None

    def add(self, step: int, measures: LogWindow, *, must_stop: bool) -> None:
        """Add a step that is done."""
        is_first, is_last = self._first is None, must_stop or step == self._steps
        if self._first is None:
            # Without the first step, which compiles kernels and allocates memory.
            self._first = step, time.monotonic()
        self._window.add(measures)
        if not (is_first or is_last or self._console.is_due()):
            return
        first, since = self._first
        left = (time.monotonic() - since) / (step - first) * (self._steps - step) if step > first else None
        row = self._window.row(self._peak) | {"memory/peak_bytes": peak_memory_bytes(self._device)}
        self._console.training(step, self._steps, row, left, always=is_first or is_last)
        self._window = LogWindow()


def count_spike(row: Row, rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """Add `loss_spikes`, their number so far, to the row after `rows`; warn of one."""
    last: Row = next((before for before in reversed(rows) if "loss" in before), {})
    row["loss_spikes"] = last.get("loss_spikes", 0)
    usual = usual_loss(rows, row)
    if usual is not None:
        row["loss_spikes"] += 1
        say(
            f"warning: the loss jumped to {row['loss']:.4g} at step {row['step']:.0f}, "
            f"from {usual:.4g} before"
        )


def check_keep_best(config: RunConfig, labels: tuple[str, ...]) -> None:
    """Check that every evaluation has the metric `trainer.keep_best`; `labels`: of its sources."""
    metric, loss = config.trainer.keep_best, config.loss
    names = MetricPlan(loss, labels, is_evaluation=True).names
    found = [PREFIX + name for name in names + (() if loss.is_one_sided else MARGIN_PERCENTILES)]
    if metric is not None and metric not in found:
        near = difflib.get_close_matches(metric, found, n=3) or found[:3]
        raise ConfigError(
            "the evaluations of this run do not have this metric",
            where="trainer.keep_best",
            got=metric,
            expected=f"a metric of docs/metrics.md, such as {', '.join(near)}",
            remedy="set trainer.keep_best to one of them; of one source: eval_rewards/accuracies/LABEL",
        )


def best_after(
    trainer: TrainerConfig, best: Sequence[BestCheckpoint], step: int, row: Mapping[str, float]
) -> list[BestCheckpoint]:
    """Return the best checkpoints after an evaluation, the best first; of equal ones, the earlier is better.

    Those of another metric do not count, nor does the start of a run, which has no checkpoint. A value that
    is missing or not finite is never among the best.
    """
    metric = trainer.keep_best
    if metric is None:
        return []
    kept = [one for one in best if one.metric == metric and one.step != step]
    if step > 0 and math.isfinite(row.get(metric, math.nan)):
        kept.append(BestCheckpoint(metric, step, row[metric]))
    sign = -1 if direction_of(trainer) is Direction.highest else 1
    return sorted(kept, key=lambda one: (sign * one.value, one.step))[:1]


def still_there(best: Sequence[BestCheckpoint], root: Path) -> list[BestCheckpoint]:
    """Return those whose checkpoints below `root` are complete, checked by size only.

    After the newest checkpoint was damaged, that of an earlier step names best ones that are deleted since.
    """
    return [one for one in best if has_all_files(root / checkpoint_name(one.step))]


_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Loop:
    """The parts of one run that its steps use; `training.run` builds them.

    Attributes:
        reference_sync: None unless the reference follows the policy.
        start_is_known: the evaluation before the first step takes the reference's log-probs for the policy's.
        peak: floating-point operations per second of all devices.
        checkpoints: saves the engines.
        identity: digests of the run's inputs, written to every checkpoint.
        recorder: on rank 0; None on the others.
        samples: at evaluations; None: none.
    """

    run: Run
    inputs: Inputs
    policy: PolicyEngine
    objective: Objective
    reference_sync: ReferenceSync | None
    start_is_known: bool
    peak: float
    checkpoints: CheckpointSaver
    identity: Identity
    recorder: Recorder | None
    samples: Samples | None

    def train(self, position: Position) -> bool:
        """Train from `position` to the last step, or until a rank asks to stop; collective.

        Return whether the last step is done; else the run was stopped, with a checkpoint saved.
        """
        self.run.clock.enter("other")
        trainer, steps, eval_set = self.run.config.trainer, self.inputs.sampler.steps, self.inputs.eval_set
        if eval_set is not None and position.step == 0:
            position.owes_evaluation = True
        must_stop = False
        progress = Progress(self.run.console, steps, self.peak, self.run.world.device)
        with (
            self.run.stops.request.deferred(),
            self.run.console.until_end(),
            prefetch(self._ready_steps(position.step), _STEPS_AHEAD) as ready_steps,
        ):
            if self._evaluate(position):
                self._keep_owed(position)
            if position.owes_evaluation:
                self._say_why(position)
            while position.step < steps and not must_stop and not position.owes_evaluation:
                with self.run.clock.of("training"):
                    must_stop = self._step(position, ready_steps, progress)
                done = position.step
                if done == steps or _is_due(done, trainer.log_every):
                    self._record_window(position)
                if eval_set is not None and (done == steps or _is_due(done, trainer.eval_every)):
                    position.owes_evaluation = True
                    self._evaluate(position)
                if position.owes_evaluation or (must_stop and done < steps):
                    self._say_why(position)
                is_last = done == steps or must_stop or position.owes_evaluation
                if is_last or position.is_best or _is_due(done, trainer.save_every):
                    self._save(position, is_last=is_last)
        with self.run.clock.of("saving"):
            self.checkpoints.commit()
        is_done = position.step == steps and not position.owes_evaluation
        if is_done and self.run.stops.must_stop():
            self._say_why(position)
            return False
        return is_done

    def _evaluate(self, position: Position) -> bool:
        """Do the evaluation that `position` owes; still owed if a rank asks to stop; return if it is done."""
        if not position.owes_evaluation:
            return False
        assert self.inputs.eval_set is not None
        with contextlib.suppress(GivenWay), self.run.clock.of("evaluation"):
            self._record_evaluation(self.inputs.eval_set, position)
            position.owes_evaluation = False
        return not position.owes_evaluation

    def _keep_owed(self, position: Position) -> None:
        """Keep a row that is newer than the checkpoint of its step; and the checkpoint, if it is now best."""
        if position.is_best:
            self._save(position, is_last=False)
        elif self.recorder is not None:
            self.recorder.metrics.save()

    def _say_why(self, position: Position) -> None:
        saved = ", with a checkpoint" if position.step else ""
        self.run.say(f"stopping after step {position.step}{saved}: {self.run.stops.reasons()}")

    def _ready_steps(self, first: int) -> Iterator[ReadyStep]:
        """Yield every step from `first` on; runs in the prefetch thread."""
        sampler = self.inputs.sampler
        for step in range(first, sampler.steps):
            indices, costs = sampler.indices(step), self.inputs.costs
            rank_batch = self.run.shard(self.inputs.train_set, indices, costs)
            yield self.objective.ready_step(rank_batch, self.run.world.device)

    def _step(self, position: Position, ready_steps: Iterator[ReadyStep], progress: Progress) -> bool:
        """Train one step, advance `position`, and return whether a rank asked to stop.

        The host waits for the device only in DeepSpeed's update and in `reduce_step`.
        """
        world, clock = self.run.world, StepClock(self.run.world.device)
        clock.enter("data")
        ready = next(ready_steps)
        rank_batch, pairs = ready.rank_batch, ready.rank_batch.pairs
        rate = learning_rate(self.run.config.optim, position.step, self.inputs.sampler.steps)
        sums, norm = train_step(self.policy, self.objective, ready, rate, world, clock, position.running)
        if self.reference_sync is not None:
            self.reference_sync.after_step(position.step + 1)
        votes = [self.run.stops.request.vote(), self.checkpoints.is_written]
        totals = reduce_step(sums, votes, norm, world)
        stop_votes, written = totals.votes
        if written == world.size:
            clock.enter("checkpoint")
            self.checkpoints.commit()
            clock.enter("other")
        overflow, bad = is_overflow(totals, self.policy), is_bad(totals)
        running = {} if bad else position.add_running(self.run.config.loss, totals.means, pairs)
        times = {f"time/{phase}": seconds for phase, seconds in clock.stop().items()}
        measures = LogWindow(
            steps=1,
            sums=totals.sums,
            counts=totals.counts,
            values={**running, "grad_norm": totals.grad_norm, **times},
            learning_rate=rate,
            pairs=pairs,
            tokens=rank_batch.tokens,
            flops=self.inputs.flops.of(rank_batch.tokens, rank_batch.targets, rank_batch.attended),
            seconds=sum(times.values()),
        )
        position.step += 1
        position.pairs_seen += pairs
        position.train_seconds += measures.seconds
        count(position, totals, overflow=overflow)
        if overflow or bad:
            self._say_skipped(ready, totals, position, overflow=overflow)
        else:
            position.window.add(measures)
            progress.add(position.step, measures, must_stop=stop_votes > 0)
        folder, scale = self.run.folder, self.policy.loss_scale
        steps = self.inputs.sampler.steps
        error = ending_error(totals, position, steps, folder, None if scale is None else scale.value)
        if error is not None:
            position.window = measures
            self._record_window(position)
            self.checkpoints.commit()
            raise error
        return stop_votes > 0

    def _say_skipped(
        self, ready: ReadyStep, totals: StepTotals, position: Position, *, overflow: bool
    ) -> None:
        """Say why a step was skipped; of a bad one, name the pairs. Collective: no weight has changed."""
        step, scale, folder = position.step, self.policy.loss_scale, self.run.folder
        if overflow and scale is not None:
            why = f"gradients overflow in fp16; the loss scale falls to {scale.value:g}"
            self.run.say(f"step {step} was skipped: {why}")
            return
        losses = pair_losses(self.policy, self.objective, ready, position.running, self.run.world)
        pairs, dataset = self.inputs.sampler.indices(step - 1), self.inputs.train_set
        write = partial(write_bad_step, folder, totals, step, dataset, pairs, losses)
        self.run.say(self.run.write(write))

    def _record_evaluation(self, dataset: PreferenceDataset, position: Position) -> None:
        """Record one metrics row over the evaluation dataset; collective."""
        started, world = time.monotonic(), self.run.world
        every = np.arange(len(dataset), dtype=np.int64)
        rank_batch = self.run.shard(dataset, every, self.inputs.costs)
        policy = None if self.start_is_known and position.step == 0 else self.policy
        self.policy.train(False)
        metrics, values = evaluate(
            policy, self.objective, rank_batch, world, position.running, self.run.stops.give_way
        )
        speed = throughput(rank_batch.pairs, rank_batch.tokens, time.monotonic() - started)
        trainer, is_last = self.run.config.trainer, position.step == self.inputs.sampler.steps
        if is_last:
            self._write_evaluation(dataset, values, metrics)
        margins = None
        if values is not None and not self.run.config.loss.is_one_sided:
            metrics |= values.margin_percentiles()
            margins = values.margin
        measured = metrics | ({"pairs": speed["pairs"]} if policy is None else speed)
        if self.samples is not None:
            measured |= self.samples.at(position.step, self.policy, self.run.stops.give_way)
        named = {f"eval_{name}": value for name, value in measured.items()}
        self._record({**self._row_start(position), **named}, margins)
        position.best = world.on_main(lambda: best_after(trainer, position.best, position.step, named))

    def _write_evaluation(
        self, dataset: PreferenceDataset, values: PairValues | None, means: dict[str, float]
    ) -> None:
        """Write the files of the last evaluation; collective.

        Before the checkpoint of this step, from which a killed run resumes without another evaluation.
        """

        def write() -> None:
            assert values is not None
            model = str(self.run.folder.model)
            with spared("the last evaluation's folder", self.run.say):
                write_evaluation(LAST_EVALUATION, model, self.run.config, means, values, dataset)

        with self.run.console.heartbeat("computing the intervals of the last evaluation"):
            self.run.write(write)

    def _record_window(self, position: Position) -> None:
        """Record one metrics row of the steps since the last one, if one of them was applied."""
        if not position.window.steps:
            return
        row = {**self._row_start(position), **position.window.row(self.peak)}
        if self.run.world.device.type == "cuda":
            row["memory/peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        row["bad_steps"] = position.bad_steps
        if self.policy.loss_scale is not None:
            row |= {"loss_scale": self.policy.loss_scale.value, "overflows": position.overflows}
        if self.recorder is not None:
            count_spike(row, self.recorder.metrics.rows, self.run.say)
        self._record(row)
        position.window = LogWindow()

    def _row_start(self, position: Position) -> dict[str, float]:
        return {"step": position.step, "epoch": self.inputs.sampler.epoch(position.step - 1)}

    def _record(self, row: dict[str, float], margins: Margins | None = None) -> None:
        if self.recorder is not None:
            self.recorder.record(row, margins)
            self.run.console.row(row, self.inputs.sampler.steps)

    def _save(self, position: Position, *, is_last: bool) -> None:
        with self.run.clock.of("saving"):
            if self.recorder is not None:
                self.recorder.metrics.save()
            position.work, position.loss_scale = self.run.clock.read(), self.policy.loss_scale
            facts = {"steps": self.inputs.sampler.steps, "counts": self.inputs.counts}
            state = {**asdict(position), **self.identity, **facts}
            self.checkpoints.save(position.step, state, is_last=is_last)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
