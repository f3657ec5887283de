"""The learning rate as a pure function of the step: resuming needs no state."""

import math

from dpo_dist.config.schema import LearningRateSchedule, OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of `step` (0-based) in a run of `steps`.

    It rises linearly over the first `warmup_ratio` of the steps, to `optim.lr` in the last of them. Then it
    is constant, or falls to 0, which it would reach in the step after the last. The schedules of transformers
    start the warm-up one step later: their first step has a rate of 0 and does not change the weights.
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
