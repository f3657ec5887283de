"""The training loop: steps, evaluations, metrics rows and checkpoints, in the same order on all ranks.

Steps that teach nothing, because they are not finite or of a collapsed policy, are counted, and named or
ended. DeepSpeed applies no update whose gradient norm is not finite, and the norm is the same on all ranks.
"""

import contextlib
import difflib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from dpo_dist.config.metrics import PREFIX
from dpo_dist.config.rules import direction_of
from dpo_dist.config.run_folder import LAST_EVALUATION, RunFolder
from dpo_dist.config.schema import Direction, LearningRateSchedule, OptimConfig, RunConfig, TrainerConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.world import GivenWay
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.errors import ConfigError, DivergedError
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.process import prefetch
from dpo_dist.foundation.text import first_few
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import Row
from dpo_dist.insight.metrics.trackers import Margins
from dpo_dist.insight.recorder import Recorder, spared
from dpo_dist.insight.verdict.facts import is_collapsed, usual_loss
from dpo_dist.objective.metrics import MARGIN_PERCENTILES, MetricPlan
from dpo_dist.training.evaluate import write_evaluation
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.resume import Identity
from dpo_dist.training.samples import Samples
from dpo_dist.training.start import Run
from dpo_dist.training.state import BestCheckpoint, LogWindow, Position, throughput
from dpo_dist.training.step import (
    Objective,
    ReadyStep,
    StepClock,
    StepTotals,
    evaluate,
    pair_losses,
    reduce_step,
    train_step,
)

_STEPS_WITHOUT_WARMUP = 10_000
"""The time scale of `inverse_sqrt` without warm-up, as in transformers."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of `step` (0-based) in a run of `steps`.

    It rises linearly over the first `warmup_steps`, or over `warmup_ratio` of the steps, to `optim.lr` in the
    last of them. Then it is constant, falls to `min_lr_ratio` of `optim.lr`, which it would reach in the step
    after the last, or falls with the inverse root of the step (`inverse_sqrt`, arXiv:2106.04560), whatever
    the number of steps is. The schedules of transformers start the warm-up one step later: their first step
    has a rate of 0 and does not change the weights; after the warm-up they are equal.
    """
    warmup_steps = math.ceil(optim.warmup_ratio * steps) if optim.warmup_steps is None else optim.warmup_steps
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    match optim.schedule:
        case LearningRateSchedule.constant:
            return optim.lr
        case LearningRateSchedule.linear:
            share = 1 - progress
        case LearningRateSchedule.cosine:
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case LearningRateSchedule.inverse_sqrt:
            scale = warmup_steps or _STEPS_WITHOUT_WARMUP
            return optim.lr * math.sqrt(scale / (step - warmup_steps + scale))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)


def check_warmup(optim: OptimConfig, steps: int) -> None:
    """Check that the warm-up ends within a run of `steps`."""
    if optim.warmup_steps is not None and optim.warmup_steps > steps:
        raise ConfigError(
            "the warm-up is longer than the run, so that optim.lr is never reached",
            where="optim.warmup_steps",
            got=f"{optim.warmup_steps} of {steps} steps",
            remedy="lower optim.warmup_steps, or raise trainer.epochs",
        )


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


MOST_BAD_STEPS = 3  # in a row
_BAD_AT_THE_END = 1
"""One bad pair may be in the last batch; more bad steps there are a policy that computes nothing finite."""


def count(position: Position, totals: StepTotals, *, overflow: bool) -> None:
    """Count a step, whose number is `position.step` already, in `position`."""
    if overflow:
        position.overflows += 1
    elif totals.is_bad:
        position.bad_steps += 1
        position.bad_in_a_row += 1
    else:
        position.bad_in_a_row = 0
        collapsed = is_collapsed({**totals.means, "grad_norm": totals.grad_norm})
        position.collapsed_in_a_row = position.collapsed_in_a_row + 1 if collapsed else 0


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def ending_error(
    totals: StepTotals, position: Position, steps: int, folder: RunFolder
) -> DivergedError | None:
    """Return the error that ends a run of `steps` after this one, if it must; the same on all ranks."""
    step, is_last = position.step, position.step == steps
    allowed = min(MOST_BAD_STEPS, _BAD_AT_THE_END) if is_last else MOST_BAD_STEPS
    has_trained_nothing = is_last and position.bad_steps + position.overflows == steps
    if has_trained_nothing and not position.bad_in_a_row:
        return DivergedError(
            "the run has trained nothing: gradients overflow in fp16, and no update was applied",
            where="model.dtype",
            got=f"{position.overflows} overflows and {position.bad_steps} bad steps in {step} steps",
            remedy="train for more steps, as each overflow halves the scale, or set model.dtype=bf16 or fp32",
        )
    if position.bad_in_a_row > allowed or has_trained_nothing:
        return DivergedError(
            f"loss or gradient is not finite at step {step}; this update was not applied",
            where=f"the pairs of this step: {folder.bad_step(step)}",
            got=f"loss {totals.means['loss']}, gradient norm {totals.grad_norm}; bad steps in a row: "
            f"{position.bad_in_a_row}, of this run: {position.bad_steps}",
            expected=f"at most {allowed} in a row here ({_BAD_AT_THE_END} at the end)",
            remedy="lower optim.lr or raise optim.warmup_ratio, and look at these pairs",
        )
    if position.collapsed_in_a_row > MOST_BAD_STEPS or (position.collapsed_in_a_row and is_last):
        return DivergedError(
            f"the policy has collapsed: the gradient is 0 at step {step}, and nothing is learnt",
            where="optim.lr",
            got=f"{totals.means['logps/chosen_per_token']:.4g} nats per token of chosen responses, loss "
            f"{totals.means['loss']:.4g}; steps of this kind in a row: {position.collapsed_in_a_row}",
            remedy="lower optim.lr or raise optim.warmup_ratio; from the first step on: check model.path",
        )
    return None


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
        loss, norm = totals.means["loss"], totals.grad_norm

        def write() -> str:
            origins = map(self.inputs.train_set.origin, self.inputs.sampler.indices(step - 1).tolist())
            pairs = [
                {"source": origin.source, "line": origin.line, "loss": _json_number(loss_of_pair)}
                for origin, loss_of_pair in zip(origins, losses, strict=True)
            ]
            content = {"step": step, "loss": _json_number(loss), "grad_norm": _json_number(norm)}
            write_text(file, json.dumps({**content, "pairs": pairs}, indent=1) + "\n")
            named = [f"{pair['source']}:{pair['line']}" for pair in pairs if isinstance(pair["loss"], str)]
            return first_few(named) or "no pair alone is the cause"

        causes = self.run.write(write)
        self.run.say(
            f"warning: step {step} was skipped: loss {loss:.4g}, gradient norm {norm:.4g}; {causes}; "
            f"all pairs of the step: {file}"
        )

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

            def write() -> None:
                with spared("the last evaluation's folder", self.run.say):
                    model = str(self.run.folder.model)
                    write_evaluation(LAST_EVALUATION, model, self.run.config, metrics, values, dataset)

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
