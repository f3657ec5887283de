"""The training loop: steps, evaluations, metrics rows and checkpoints, in the same order on all ranks.

A bad step, whose loss or gradient is not finite, is skipped, and its pairs are written to a file; several bad
steps in a row, or steps of a collapsed policy, end the run. All ranks skip the same steps: DeepSpeed applies
no update whose gradient norm is not finite, and the norm is the same on all ranks.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.config.metrics import ACCURACIES, MAIN, METRICS, PREFIX, is_evaluation
from dpo_dist.distributed.checkpoint.saver import CheckpointSaver
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.distributed.processes.world import Interrupted
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.background import prefetch
from dpo_dist.foundation.console import TRAINING, Console
from dpo_dist.foundation.signals import BY_CALLBACK
from dpo_dist.foundation.text import duration, percent_of, size
from dpo_dist.objective.metrics import PairColumn
from dpo_dist.training.reporting.protocols import Ask, OnStep, Samples, StepDone
from dpo_dist.training.reporting.recorder import Recorder
from dpo_dist.training.start.inputs import Inputs
from dpo_dist.training.start.open_run import Run
from dpo_dist.training.start.run_state import Identity
from dpo_dist.training.steps.health import (
    best_after,
    count_spike,
    count_step,
    divergence_error,
    pair_losses,
    write_bad_step,
)
from dpo_dist.training.steps.schedule import learning_rate
from dpo_dist.training.steps.state import LogWindow, Position, throughput
from dpo_dist.training.steps.step import (
    Objective,
    ReadyStep,
    StepTotals,
    evaluate,
    reduce_step,
    train_step,
    without_comparisons,
)

_STEPS_AHEAD = 2
_IN_LINE = ("rewards/margins", "pairs_per_second", "mfu")


@dataclass(frozen=True)
class Loop:
    """Trains one run and records its rows; `training.run` builds the parts."""

    run: Run
    inputs: Inputs
    costs: ComputeCosts  # balance micro-batches
    policy: PolicyEngine
    objective: Objective
    # The policy starts as the reference: the first evaluation needs no policy forward.
    policy_answers_as_reference: bool
    peak: float  # FLOP/s of all devices
    recorder: Recorder | None  # on rank 0
    samples: Samples | None  # written at evaluations
    on_step: OnStep | None  # of the user, called on rank 0
    reference_sync: ReferenceSync | None  # None unless the reference follows the policy
    checkpoints: CheckpointSaver
    identity: Identity  # digests of the run's inputs, written to every checkpoint
    reference_report: dict[str, Any]  # section `reference` of summary.json, from the start that scored

    def train(self, position: Position) -> bool:
        """Train from `position` until the run is over, or a rank asks to stop; collective.

        Return whether the run is over; if not, it was stopped and has a checkpoint.
        """
        steps = self.inputs.sampler.steps
        eval_set = self.inputs.eval_set
        # The model before its first step is evaluated, too: later rows are compared with it.
        position.evaluation_is_due |= eval_set is not None and position.step == 0
        must_stop = False
        trainer = self.run.config.trainer
        unit = self.run.config.loss.unit
        progress = Progress(self.run.console, steps, self.peak, self.run.world.device, unit)
        # A signal only notes that a stop is wanted. The ranks agree on it in the sum that ends a step
        # (`reduce_step`), so that all leave at the same step and nobody waits in a collective call.
        with (
            self.run.stops.request.deferred(),
            self.run.console.until_end(),
            prefetch(self._ready_steps(position.step), _STEPS_AHEAD) as ready_steps,
        ):
            if self._evaluate(position):
                self.save_rows()  # this step was saved without the new row
                if position.best_step == position.step:
                    self._save(position, is_last=False)
            if position.evaluation_is_due:
                self._say_why_it_stops(position)
            while not (must_stop or position.evaluation_is_due or self.is_over(position)):
                asked = self._step(position, ready_steps, progress)
                done = position.step
                is_at_end = done == steps
                must_stop = Ask.stop in asked
                if Ask.log in asked or is_at_end or _is_due(done, trainer.log_every):
                    self.record_steps(position)
                if eval_set is not None and (is_at_end or _is_due(done, trainer.eval_every)):
                    position.evaluation_is_due = True
                    self._evaluate(position)
                is_over = self.is_over(position)
                if position.evaluation_is_due or (must_stop and not is_over):
                    self._say_why_it_stops(position)
                is_last = is_over or must_stop or position.evaluation_is_due
                must_save = Ask.save in asked or _is_due(done, trainer.save_every)
                if is_last or must_save or position.best_step == done:
                    self._save(position, is_last=is_last)
        # The last checkpoint may still be with its background thread.
        self.checkpoints.commit()
        is_done = self.is_over(position) and not position.evaluation_is_due
        # A stop that came after the last step still ends this start: what follows, such as writing the model,
        # may take longer than the time that is left.
        if is_done and self.run.stops.must_stop():
            self._say_why_it_stops(position)
            return False
        return is_done

    def _evaluate(self, position: Position) -> bool:
        """Evaluate if an evaluation is due, unless a rank asks to stop; return whether it was done."""
        if not position.evaluation_is_due:
            return False
        with contextlib.suppress(Interrupted):
            self.record_evaluation(position)
            position.evaluation_is_due = False
        return not position.evaluation_is_due

    def _say_why_it_stops(self, position: Position) -> None:
        checkpoint = ", with a checkpoint" if position.step else ""
        self.run.say(f"stopping after step {position.step}{checkpoint}: {self.run.stops.reasons()}")

    def _ready_steps(self, first: int) -> Iterator[ReadyStep]:
        """Yield every step from `first` on; called in the prefetch thread."""
        sampler = self.inputs.sampler
        for step in range(first, sampler.steps):
            rank_batch = self.run.shard(self.inputs.train_set, sampler.indices(step), self.costs)
            yield self.objective.ready_step(rank_batch, self.run.world.device)

    def _step(self, position: Position, ready_steps: Iterator[ReadyStep], progress: "Progress") -> set[Ask]:
        """Train one step, advance `position`, and return what the ranks ask for after it.

        Only DeepSpeed's update and `reduce_step` make the host wait for the device.
        """
        # The step: next batch, forward and backward, update, and one sum of metrics and votes over the ranks.
        world = self.run.world
        started = time.monotonic()
        ready = next(ready_steps)
        rank_batch = ready.rank_batch
        pairs = ready.rank_batch.pairs
        partners = rank_batch.partners
        rate = learning_rate(self.run.config.optim, position.step, self.inputs.sampler.steps)
        sums, norm = train_step(self.policy, self.objective, ready, rate, world, position.running)
        if self.reference_sync is not None:
            self.reference_sync.after_step(position.step + 1)
        asked = self._ask_user(position.step)
        votes = {
            Ask.stop: self.run.stops.request.vote(),
            Ask.log: asked is Ask.log,
            Ask.save: asked is Ask.save,
        }
        facts = (self.checkpoints.is_written, self.policy.has_lost_gradients)
        totals = reduce_step(sums, [*facts, *votes.values()], norm, world)
        if self.policy_answers_as_reference and position.step == 0:
            totals = without_comparisons(totals)
        writers, lost, *counts = totals.votes
        asked_for = {ask for ask, count in zip(votes, counts, strict=True) if count}
        # Committing is collective, so it waits for the step at which every rank's files are written.
        if writers == world.size:
            self.checkpoints.commit()
        if lost:
            self.policy.check_gradients()
        # What the step did: an update, a smaller loss scale, or a bad step whose pairs are written down.
        overflow = self.policy.has_overflowed and math.isfinite(totals.means["loss"])
        running = {} if totals.is_bad else position.add_running(self.run.config.loss, totals.means, pairs)
        tokens = rank_batch.tokens
        flops = self.inputs.flops.step(
            rank_batch.computed_tokens, rank_batch.targets, rank_batch.attended, rank_batch.image_tokens
        )
        if partners is not None:
            tokens += partners.tokens
            flops += self.inputs.flops.forward(
                partners.computed_tokens, partners.targets, partners.attended, partners.image_tokens
            )
        measures = LogWindow(
            steps=1,
            sums=totals.sums,
            counts=totals.counts,
            values={**running, "grad_norm": totals.grad_norm},
            learning_rate=rate,
            pairs=pairs,
            tokens=tokens,
            flops=flops,
            seconds=time.monotonic() - started,  # the sum of the metrics waited for the device
        )
        position.step += 1
        position.pairs_seen += pairs
        position.train_seconds += measures.seconds
        count_step(position.health, totals, overflow=overflow)
        if overflow or totals.is_bad:
            self._say_skipped(ready, totals, position, overflow=overflow)
        else:
            position.window.add(measures)
            progress.add(position.step, measures, must_stop=Ask.stop in asked_for)
        # All ranks have the same totals, so all raise the same error here.
        error = divergence_error(totals, position, self.inputs.sampler.steps, self.run.folder)
        if error is not None:
            position.window = measures
            self.record_steps(position)
            self.checkpoints.commit()
            raise error
        return asked_for

    def _ask_user(self, step: int) -> Ask | None:
        """Call the user's function after the update of step number `step`, from 0; on rank 0."""
        if self.on_step is None or not self.run.world.is_main:
            return None
        sampler = self.inputs.sampler
        asked = self.on_step(StepDone(step + 1, sampler.steps, sampler.epoch(step), self.policy))
        if asked is Ask.stop:
            self.run.stops.request.ask(BY_CALLBACK)
        return asked

    def _say_skipped(
        self, ready: ReadyStep, totals: StepTotals, position: Position, *, overflow: bool
    ) -> None:
        """Print why a step was skipped; write the pairs of a bad step, which are scored again. Collective."""
        step = position.step
        scale = self.policy.loss_scale
        file = self.run.folder.bad_step(position.step)
        if overflow and scale is not None:
            why = f"gradients overflow in fp16; the loss scale falls to {scale.value:g}"
            self.run.say(f"step {step} was skipped: {why}")
            return
        losses = pair_losses(self.policy, self.objective, ready, position.running, self.run.world)

        def write() -> str:
            indices = self.inputs.sampler.indices(step - 1).tolist()
            return write_bad_step(file, step, totals, map(self.inputs.train_set.origin, indices), losses)

        causes = self.run.write(write)
        self.run.warn(
            f"step {step} was skipped: loss {totals.means['loss']:.4g}, gradient norm "
            f"{totals.grad_norm:.4g}; {causes}; all pairs of the step: {file}"
        )

    def _save(self, position: Position, *, is_last: bool) -> None:
        self.save_rows()
        scale = self.policy.loss_scale
        state = {
            **asdict(position),
            **self.identity,
            "steps": self.inputs.sampler.steps,
            "counts": self.inputs.counts,
            "reference_report": self.reference_report,
            "loss_scale": None if scale is None else asdict(scale),
        }
        self.checkpoints.save(position.step, state, best_step=position.best_step, is_last=is_last)

    def record_evaluation(self, position: Position) -> None:
        """Evaluate, record the row, and update `position.best`; may raise `Interrupted`. Collective."""
        started = time.monotonic()
        world = self.run.world
        dataset = self.inputs.eval_set
        assert dataset is not None, "evaluations have data"
        rank_batch = self.run.shard(dataset, np.arange(len(dataset)), self.costs)
        policy = None if self.policy_answers_as_reference and position.step == 0 else self.policy
        self.policy.train(False)
        metrics, values = evaluate(
            policy, self.objective, rank_batch, world, position.running, self.run.stops.raise_if_stopping
        )
        speed = throughput(rank_batch.pairs, rank_batch.tokens, time.monotonic() - started)
        trainer = self.run.config.trainer
        measured = dict(metrics)
        margins = None
        if self.run.config.loss.compares_pairs:
            measured |= values.margin_percentiles()
            margins = values.margin
        if self.run.config.loss.is_unpaired and dataset.labels:
            numbers = dataset.label_numbers(np.arange(len(dataset)))
            measured |= values.auc_by_source(dataset.labels, numbers)
        measured |= {"pairs": speed["pairs"]} if policy is None else speed
        eval_row = {f"eval_{name}": value for name, value in measured.items()}
        # Rank 0 decides for all, because times differ between ranks: the collective calls that follow depend
        # on whether the run is over (law L2).
        best = world.on_main(lambda: best_after(trainer, position.best, position.step, eval_row))
        is_better = best is not None and best.step == position.step
        stale = 0 if is_better else position.stale_evaluations + 1
        is_over = self.is_over(replace(position, best=best, stale_evaluations=stale))
        if self.samples is not None:
            sampled = self.samples.write_responses(position.step, self.policy, is_last=is_over)
            eval_row |= {f"eval_{name}": value for name, value in sampled.items()}
        position.best = best
        position.stale_evaluations = stale
        if is_over:
            self.record_steps(position)

            def write() -> None:
                assert self.recorder is not None
                self.recorder.evaluation(metrics, values, self.inputs)

            # Before this step's checkpoint is saved: a run that resumes from it does not evaluate again.
            with self.run.console.heartbeat("computing the intervals of the last evaluation"):
                self.run.write(write)
        self._record(position, eval_row, margins)

    def is_over(self, position: Position) -> bool:
        """Return whether the run ends after this step: the last one, or `trainer.patience` is reached."""
        trainer = self.run.config.trainer
        best = position.best
        is_stale = best is not None and position.stale_evaluations >= (trainer.patience or math.inf)
        return is_stale or position.step == self.inputs.sampler.steps

    def record_steps(self, position: Position) -> None:
        """Record a row of the steps since the last row, if at least one of them was applied."""
        if not position.window.steps:
            return
        row = position.window.row(self.peak)
        if self.run.world.device.type == "cuda":
            row["memory/peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            row["memory/peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        row["bad_steps"] = position.health.bad_steps
        if self.policy.loss_scale is not None:
            row |= {"loss_scale": self.policy.loss_scale.value, "overflows": position.health.overflows}
        self._record(position, row)
        position.window = LogWindow()

    def _record(
        self, position: Position, values: dict[str, float], margins: PairColumn | None = None
    ) -> None:
        if self.recorder is None:
            return
        row = {"step": position.step, "epoch": self.inputs.sampler.epoch(position.step - 1), **values}
        if "loss" in row:
            count_spike(row, self.recorder.metrics.rows, self.run.warn)
        self.recorder.row(row, margins)
        show_row(self.run.console, row, self.inputs.sampler.steps, self.run.config.loss.unit)

    def save_rows(self) -> None:
        """Flush the rows so far to disk; on rank 0."""
        if self.recorder is not None:
            self.recorder.metrics.save()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Progress:
    """Shows progress; the first and the last step of a start are always shown."""

    def __init__(self, console: Console, steps: int, peak: float, device: torch.device, unit: str):
        self._console = console
        self._steps = steps
        self._peak = peak
        self._device = device
        self._unit = unit  # `LossConfig.unit`
        self._window = LogWindow()
        self._first: tuple[int, float] | None = None

    def add(self, step: int, measures: LogWindow, *, must_stop: bool) -> None:
        """Add a finished step, and show the progress if it is due."""
        is_first = self._first is None
        is_last = must_stop or step == self._steps
        if self._first is None:
            # The first step does not count: compiling kernels would make the time left too long.
            self._first = step, time.monotonic()
        self._window.add(measures)
        if not (is_first or is_last or self._console.is_due()):
            return
        first, since = self._first
        left = (time.monotonic() - since) / (step - first) * (self._steps - step) if step > first else None
        row = self._window.row(self._peak) | {"memory/peak_bytes": peak_memory_bytes(self._device)}
        if self._device.type == "cpu":  # of no use on a CPU
            del row["mfu"]
        show_step(self._console, step, self._steps, row, left, self._unit, always=is_first or is_last)
        self._window = LogWindow()


def show_step(
    console: Console,
    step: int,
    steps: int,
    values: Mapping[str, float],
    seconds_left: float | None = None,
    unit: str = "pair",
    *,
    always: bool = False,
) -> None:
    """Show the progress if it is due, or `always`; `values` are those of a metrics row.

    A narrow terminal cuts the end of the line, so that the most important values come first.
    """
    parts = [f"step {step:,}/{steps:,}"]
    parts += [_in_words(name, values[name]) for name in ("loss", *ACCURACIES) if name in values]
    if seconds_left is not None and step < steps:
        parts.append(f"{duration(seconds_left)} left")
    parts += [_in_words(name, values[name], unit) for name in _IN_LINE if name in values]
    peak = values.get("memory/peak_bytes")
    if peak is not None:
        parts.append(size(peak))
    content = {"work": TRAINING, "unit": "step", "done": step, "total": steps, "share": step / steps}
    console.show_progress({**content, "seconds_left": seconds_left}, "  ".join(parts), always=always)


def show_row(console: Console, row: Mapping[str, float], steps: int, unit: str = "pair") -> None:
    """Show a metrics row of a run of `steps`; people see rows of evaluations only, programs all rows."""
    if not is_evaluation(row):
        console.result("step", row, [])
        return
    measured = (name for name in (*MAIN, "pairs_per_second") if PREFIX + name in row)
    parts = [_in_words(name, row[PREFIX + name], unit) for name in measured]
    length = row.get("eval_samples/length")
    if length is not None:
        parts.append(f"samples of {length:,.0f} tokens")
    finished = row.get("eval_samples/finished")
    if finished is not None:
        parts.append(f"{percent_of(finished, int(row['eval_samples/prompts']))} finished")
    line = f"step {int(row['step']):,}/{steps:,}  evaluation: {', '.join(parts)}"
    console.result("evaluation", row, [line])


def _in_words(name: str, value: float, unit: str = "pair") -> str:
    """Return a value with its name or unit: "loss 0.6931", "MFU 41 %", "161.7 pairs/s"."""
    metric = METRICS[name]
    if name == "pairs_per_second":
        return f"{metric.form(value)} {unit}s/s"
    return f"{metric.title} {metric.form(value)}"
