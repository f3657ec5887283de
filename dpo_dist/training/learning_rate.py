"""The learning rate as a pure function of the step, so that resuming needs no state."""

import math

from dpo_dist.config.schema import LearningRateSchedule, OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The rate of `step` (0-based) in a run of `steps`.

    It rises linearly over the first `warmup_ratio` of the steps, reaching `optim.lr` in the last of them, and
    then stays, or falls towards 0, which the step after the last would have. The schedules of transformers
    differ in the warm-up only, which they start one step later: their first step has a rate of 0, so that its
    batch changes nothing.
    """
    warmup_steps = math.ceil(optim.warmup_ratio * steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    match optim.schedule:
        case LearningRateSchedule.constant:
            return optim.lr
        case LearningRateSchedule.linear:
            return optim.lr * (1 - progress)
        case LearningRateSchedule.cosine:
            return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    raise AssertionError(f"no formula for schedule {optim.schedule}")
