"""The metrics rows of a run: of the steps since the last row, and of each evaluation."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from dpo_dist.batching.plan import ComputeCosts
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.objective.metrics import AUC, PairValues, Values, wins
from dpo_dist.training.context import Run
from dpo_dist.training.health import best_after, count_spike
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.progress import show_row
from dpo_dist.training.reporting import Recorder, Samples
from dpo_dist.training.state import LogWindow, Position, throughput
from dpo_dist.training.step import Objective, evaluate


@dataclass(frozen=True)
class Rows:
    """The parts of one run, and the rows that are measured and recorded of it."""

    run: Run
    inputs: Inputs
    costs: ComputeCosts  # by which micro-batches are balanced
    policy: PolicyEngine
    objective: Objective
    start_is_known: bool  # the evaluation before the first step takes the reference's log-probs
    peak: float  # floating-point operations per second of all devices
    recorder: Recorder | None  # on rank 0
    samples: Samples | None  # at evaluations

    def record_evaluation(self, position: Position) -> None:
        """Evaluate, record the row, and update `position.best`; collective. May raise `Interrupted`."""
        started, world = time.monotonic(), self.run.world
        dataset, every = self.inputs.visited[-1]  # the evaluation data
        rank_batch = self.run.shard(dataset, every, self.costs)
        policy = None if self.start_is_known and position.step == 0 else self.policy
        self.policy.train(False)
        metrics, values = evaluate(
            policy, self.objective, rank_batch, world, position.running, self.run.stops.raise_if_stopping
        )
        speed = throughput(rank_batch.pairs, rank_batch.tokens, time.monotonic() - started)
        trainer, measured, margins = self.run.config.trainer, dict(metrics), None
        if self.run.config.loss.compares_pairs:
            measured |= values.margin_percentiles()
            margins = values.margin
        if self.run.config.loss.is_unpaired:
            measured |= _auc_by_source(dataset, values)
        measured |= {"pairs": speed["pairs"]} if policy is None else speed
        if self.samples is not None:
            measured |= self.samples.at(position.step, self.policy)
        named = {f"eval_{name}": value for name, value in measured.items()}
        position.best = world.on_main(lambda: best_after(trainer, position.best, position.step, named))
        is_better = position.step in (0, position.best_step)
        position.stale_evaluations = 0 if is_better else position.stale_evaluations + 1
        if self.is_over(position):
            self.record_steps(position)

            def write() -> None:
                assert self.recorder is not None
                self.recorder.evaluation(metrics, values, self.inputs)

            # Before the checkpoint of this step, from which a killed run resumes without another evaluation.
            with self.run.console.heartbeat("computing the intervals of the last evaluation"):
                self.run.write(write)
        self._record(position, named, margins)

    def is_over(self, position: Position) -> bool:
        """Return whether the run ends after this step: the last one, or that of `trainer.patience`."""
        trainer, best = self.run.config.trainer, position.best
        is_known = best is not None and best.metric == trainer.keep_best  # not that of an earlier start
        is_stale = is_known and position.stale_evaluations >= (trainer.patience or math.inf)
        return is_stale or position.step == self.inputs.sampler.steps

    def record_steps(self, position: Position) -> None:
        """Record the row of the steps since the last row, if any of them was applied."""
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

    def _record(self, position: Position, values: dict[str, float], margins: Values | None = None) -> None:
        if self.recorder is None:
            return
        row = {"step": position.step, "epoch": self.inputs.sampler.epoch(position.step - 1), **values}
        if "loss" in row:
            count_spike(row, self.recorder.metrics.rows, self.run.say)
        self.recorder.row(row, margins)
        show_row(self.run.console, row, self.inputs.sampler.steps, self.run.config.loss.unit)

    def save_rows(self) -> None:
        """Write the rows so far; on rank 0."""
        if self.recorder is not None:
            self.recorder.metrics.save()


def _auc_by_source(dataset: PreferenceDataset, values: PairValues) -> dict[str, float]:
    """Return the AUC of each source that has good and bad responses; `values` are of the whole dataset."""
    measured = dict[str, float]()
    numbers = dataset.label_numbers(np.arange(len(dataset))) if dataset.labels else None
    for number, label in enumerate(dataset.labels):
        sides = (
            (values.tokens_chosen, values.reward_chosen),
            (values.tokens_rejected, values.reward_rejected),
        )
        good, bad = (
            torch.from_numpy(rewards[(numbers == number) & (tokens > 0)]) for tokens, rewards in sides
        )
        if len(good) and len(bad):
            measured[f"{AUC}/{label}"] = float(wins(good, bad)) / (len(good) * len(bad))
    return measured
