"""Dynamic loss scale of training in fp16, the same on all ranks (Micikevicius et al., arXiv:1710.03740).

DeepSpeed multiplies the loss by it and divides the gradients. Its own dynamic scale doubles between the two,
which halves the gradients of that step. So DeepSpeed has a fixed scale, which is set from here between steps.
"""

from dataclasses import dataclass

START = 2.0**16
_LOWEST = 1.0
_STEPS_TO_DOUBLE = 1000


@dataclass(frozen=True)
class LossScale:
    """A power of two, by which the loss of a step is multiplied.

    Attributes:
        value: the factor.
        applied: updates since it last changed.
    """

    value: float = START
    applied: int = 0

    def after(self, *, is_applied: bool) -> "LossScale":
        """Return the scale of the next step: half after an overflow, double after 1,000 updates without."""
        if not is_applied:
            return LossScale(max(_LOWEST, self.value / 2))
        if self.applied + 1 == _STEPS_TO_DOUBLE:
            return LossScale(self.value * 2)
        return LossScale(self.value, self.applied + 1)

    @property
    def can_fall(self) -> bool:
        """Whether a smaller scale may help against an overflow."""
        return self.value > _LOWEST
