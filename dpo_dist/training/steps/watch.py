"""Calls a function of the user at the points of the loop, on rank 0; what it asks for holds on all ranks."""

from collections.abc import Collection
from dataclasses import dataclass

from dpo_dist.batching.sampler import BatchSampler
from dpo_dist.distributed.zero import Engine
from dpo_dist.foundation.signals import BY_CALLBACK
from dpo_dist.training.reporting.protocols import Moment, OnMoment, When, Wish
from dpo_dist.training.start.open_run import Run


@dataclass(frozen=True)
class Watch:
    """The function that follows a run, or None on all ranks."""

    on_moment: OnMoment | None
    run: Run
    sampler: BatchSampler
    policy: Engine

    def at(self, when: When, step: int) -> Collection[Wish]:
        """Call the function after `step` steps, on rank 0, and return what it asks for; not collective."""
        if self.on_moment is None or not self.run.world.is_main:
            return ()
        epoch = self.sampler.epoch(step - 1)
        wishes = self.on_moment(Moment(when, step, self.sampler.steps, epoch, self.policy))
        if Wish.stop in wishes:
            self.run.stops.request.ask_after_step(BY_CALLBACK)
        return wishes

    def agreed(self, when: When, step: int) -> Collection[Wish]:
        """Call the function as `at` does, and return what it asks for on all ranks; collective."""
        return () if self.on_moment is None else self.run.world.on_main(lambda: self.at(when, step))

    def ends_epoch(self, step: int) -> bool:
        """Return whether the step before `step` ended an epoch, or the run."""
        before, after = (self.sampler.epoch(number - 1) for number in (step - 1, step))
        return int(before) < int(after) or step == self.sampler.steps
