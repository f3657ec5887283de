"""Continue a run to a greater length than it had: the only change of its result that resuming accepts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpo_dist.config.foreign_code import read_config
from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import from_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import CheckpointError, ConfigError
from dpo_dist.training.learning_rate import learning_rate


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
