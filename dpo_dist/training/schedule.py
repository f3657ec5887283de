"""The learning rate as a pure function of the step, and the continuation of a run to a greater length."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import from_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import LearningRateSchedule, OptimConfig, RunConfig
from dpo_dist.config.user_code import read_config
from dpo_dist.foundation.errors import CheckpointError, ConfigError

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
    warmup_steps = warmup_length(optim, steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    match optim.schedule:
        case LearningRateSchedule.constant | LearningRateSchedule.constant_with_warmup:
            return optim.lr
        case LearningRateSchedule.linear:
            return _above_floor(optim, 1 - progress)
        case LearningRateSchedule.cosine:
            return _above_floor(optim, 0.5 * (1 + math.cos(math.pi * progress)))
        case LearningRateSchedule.inverse_sqrt:
            scale = warmup_steps or _STEPS_WITHOUT_WARMUP
            return optim.lr * math.sqrt(scale / (step - warmup_steps + scale))
    raise AssertionError(f"no formula for schedule {optim.schedule}")


def _above_floor(optim: OptimConfig, share: float) -> float:
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)


def warmup_length(optim: OptimConfig, steps: int) -> int:
    """Return the number of warm-up steps of a run of `steps`."""
    return math.ceil(optim.warmup_ratio * steps) if optim.warmup_steps is None else optim.warmup_steps


def check_warmup(optim: OptimConfig, steps: int) -> None:
    """Check that the warm-up ends within a run of `steps`.

    Raises:
        ConfigError: `optim.lr` is never reached.
    """
    if warmup_length(optim, steps) > steps:
        raise ConfigError(
            "the warm-up is longer than the run, so that optim.lr is never reached",
            where="optim.warmup_steps",
            got=f"{optim.warmup_steps} of {steps} steps",
            remedy="lower optim.warmup_steps, or raise trainer.epochs",
        )


@dataclass(frozen=True)
class Length:
    """The keys that say how long a run is."""

    epochs: float
    max_steps: int | None

    @classmethod
    def of(cls, config: RunConfig) -> "Length":
        """Return the length of a run."""
        return cls(config.trainer.epochs, config.trainer.max_steps)

    @property
    def key(self) -> str:
        """The key that counts."""
        return "trainer.epochs" if self.max_steps is None else "trainer.max_steps"

    @property
    def value(self) -> float:
        """The value of that key."""
        return self.epochs if self.max_steps is None else self.max_steps

    def __str__(self) -> str:
        return f"{self.key}={self.value:g}"


def as_text(config: RunConfig) -> str:
    """Return the length of a run for its recorded state."""
    return json.dumps(vars(Length.of(config)))


def former_length(recorded: Mapping[str, Any], config: RunConfig, folder: RunFolder) -> Length | None:
    """Return the length of a run that `config` continues to another one; None if anything else changed too.

    Args:
        recorded: the state of a checkpoint, or the identity in the state file.
        config: of this start.
        folder: the run directory; states of earlier versions do not have the length, but config.yaml has.
    """
    text = recorded.get("length")
    try:
        former = Length(**json.loads(text)) if text else _in_yaml(folder)
    except (OSError, ValueError, TypeError, RecursionError, ConfigError):
        return None
    trainer = replace(config.trainer, epochs=former.epochs, max_steps=former.max_steps)
    is_same = run_digest(replace(config, trainer=trainer)) == recorded.get("run_digest")
    return former if is_same and former != Length.of(config) else None


def _in_yaml(folder: RunFolder) -> Length:
    return Length.of(from_yaml(read_config(folder.config)))


def check_longer(recorded: Mapping[str, Any], config: RunConfig, folder: RunFolder) -> None:
    """Check that a run of another length than `config` can be continued to that of `config`.

    Args:
        recorded: the state of its checkpoint.
        config: of this start.
        folder: the run directory.

    Raises:
        CheckpointError: it would become shorter.
    """
    former, new, steps = former_length(recorded, config, folder), Length.of(config), recorded.get("steps")
    if former is None or is_longer(former, new, steps):
        return
    raise CheckpointError(
        "a run can be continued to a greater length only",
        where=new.key,
        got=str(new),
        expected=f"more than {former}"
        + (f", {steps:,} steps" if isinstance(steps, int) and former.max_steps is None else ""),
        remedy=f"set {former} to resume it as it was, a larger trainer.max_steps, or another run.dir",
    )


def is_longer(former: Length, new: Length, steps: int | None) -> bool:
    """Return whether a run becomes longer; steps cannot be compared with epochs before the data are read.

    Args:
        former: its length.
        new: the new one.
        steps: that the former length has, if known.
    """
    if former.key == new.key:
        return new.value > former.value
    return new.max_steps is not None and isinstance(steps, int) and new.max_steps > steps


def describe_change(state: Mapping[str, Any], config: RunConfig, steps: int) -> str:
    """Return a line about a run that continues to another length; "" if its length is the same.

    Args:
        state: of its checkpoint.
        config: of this start.
        steps: of the new length.
    """
    done, former = int(state["step"]), state.get("steps", steps)
    if former == steps:
        return ""
    skipped = done * config.trainer.global_batch_pairs - int(state["pairs_seen"])
    partial = f"; the next {skipped} pairs of the order are not trained" if skipped else ""
    rate = _rate(config, done, former, steps)
    return f"training longer: {steps:,} steps in place of {former:,}; {rate}{partial}"


def _rate(config: RunConfig, done: int, former: int, steps: int) -> str:
    """Return from which step on, if any, the learning rate is another one than by the former length."""
    for step in range(done, max(former, done + 1)):
        before, after = (learning_rate(config.optim, step, total) for total in (former, steps))
        if after != before:
            return (
                f"the learning rate follows the schedule of {steps:,} steps from step {step + 1:,} on "
                f"({after:.2g}, not {before:.2g})"
            )
    return "the learning rate continues"
