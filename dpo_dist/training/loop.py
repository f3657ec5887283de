"""The training loop: steps, evaluations, metrics rows and checkpoints, in the same order on all ranks.

Steps that teach nothing, because they are not finite or of a collapsed policy, are counted, and named or
ended. DeepSpeed applies no update whose gradient norm is not finite, and the norm is the same on all ranks.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.world import Interrupted
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.process import prefetch
from dpo_dist.objective.metrics import Values
from dpo_dist.training.clock import StepClock
from dpo_dist.training.context import Run
from dpo_dist.training.health import best_after, count, count_spike, ending_error, pair_losses, write_bad_step
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.progress import Progress, show_row
from dpo_dist.training.reporting import Recorder, Samples
from dpo_dist.training.resume import Identity
from dpo_dist.training.schedule import learning_rate
from dpo_dist.training.state import LogWindow, Position, throughput
from dpo_dist.training.step import Objective, ReadyStep, StepTotals, evaluate, reduce_step, train_step

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
        with contextlib.suppress(Interrupted), self.run.clock.of("evaluation"):
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
        overflow = self.policy.has_overflowed and math.isfinite(totals.means["loss"])
        running = {} if totals.is_bad else position.add_running(self.run.config.loss, totals.means, pairs)
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
        if overflow or totals.is_bad:
            self._say_skipped(ready, totals, position, overflow=overflow)
        else:
            position.window.add(measures)
            progress.add(position.step, measures, must_stop=stop_votes > 0)
        error = ending_error(totals, position, self.inputs.sampler.steps, self.run.folder)
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
        step, scale, file = position.step, self.policy.loss_scale, self.run.folder.bad_step(position.step)
        if overflow and scale is not None:
            why = f"gradients overflow in fp16; the loss scale falls to {scale.value:g}"
            self.run.say(f"step {step} was skipped: {why}")
            return
        losses = pair_losses(self.policy, self.objective, ready, position.running, self.run.world)

        def write() -> str:
            indices = self.inputs.sampler.indices(step - 1).tolist()
            return write_bad_step(file, step, totals, map(self.inputs.train_set.origin, indices), losses)

        causes = self.run.write(write)
        self.run.say(
            f"warning: step {step} was skipped: loss {totals.means['loss']:.4g}, gradient norm "
            f"{totals.grad_norm:.4g}; {causes}; all pairs of the step: {file}"
        )

    def _record_evaluation(self, dataset: PreferenceDataset, position: Position) -> None:
        """Record one metrics row over the evaluation dataset; collective."""
        started, world = time.monotonic(), self.run.world
        every = np.arange(len(dataset), dtype=np.int64)
        rank_batch = self.run.shard(dataset, every, self.inputs.costs)
        policy = None if self.start_is_known and position.step == 0 else self.policy
        self.policy.train(False)
        metrics, values = evaluate(
            policy, self.objective, rank_batch, world, position.running, self.run.stops.raise_if_stopping
        )
        speed = throughput(rank_batch.pairs, rank_batch.tokens, time.monotonic() - started)
        trainer, is_last = self.run.config.trainer, position.step == self.inputs.sampler.steps
        if is_last:

            def write() -> None:
                assert self.recorder is not None
                self.recorder.evaluation(metrics, values, dataset)

            # Before the checkpoint of this step, from which a killed run resumes without another evaluation.
            with self.run.console.heartbeat("computing the intervals of the last evaluation"):
                self.run.write(write)
        margins = None
        if not self.run.config.loss.is_one_sided:
            metrics |= values.margin_percentiles()
            margins = values.margin
        measured = metrics | ({"pairs": speed["pairs"]} if policy is None else speed)
        if self.samples is not None:
            measured |= self.samples.at(position.step, self.policy)
        named = {f"eval_{name}": value for name, value in measured.items()}
        self._record({**self._row_start(position), **named}, margins)
        position.best = world.on_main(lambda: best_after(trainer, position.best, position.step, named))

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

    def _record(self, row: dict[str, float], margins: Values | None = None) -> None:
        if self.recorder is not None:
            self.recorder.row(row, margins)
            show_row(self.run.console, row, self.inputs.sampler.steps)

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
