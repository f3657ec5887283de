"""The learning rate of each step, and its warm-up."""

import math

from dpo_dist.config.schema import LearningRateSchedule, OptimConfig
from dpo_dist.foundation.errors import ConfigError

_STEPS_WITHOUT_WARMUP = 10_000  # the time scale of `inverse_sqrt` without warm-up, as in transformers


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of `step` (0-based) in a run of `steps`.

    The rate rises linearly over the steps of `warmup`; the last step
    of the warm-up has `optim.lr` (in transformers the step after it: there the first step has rate 0). Then
    the rate is constant, falls to `min_lr_ratio` of `optim.lr` in the step after the last, or falls with the
    inverse root of the step (`inverse_sqrt`, arXiv:2106.04560), whatever the number of steps is.
    """
    warmup_steps = math.ceil(optim.warmup * steps) if optim.warmup < 1 else int(optim.warmup)
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


def check_schedule(optim: OptimConfig, steps: int) -> None:
    """Check that the warm-up ends within a run of `steps`."""
    if optim.warmup >= 1 and optim.warmup > steps:
        raise ConfigError(
            "the warm-up is longer than the run",
            where="optim.warmup",
            got=f"{optim.warmup:g} of {steps} steps",
            remedy=f"set optim.warmup={steps} or less, or raise trainer.epochs",
        )
