"""A model under the check at start, and attempts to score by it that all ranks agree on."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dpo_dist.data.packing import PackedBatch
from dpo_dist.errors import DeviceMemoryError, first_line
from dpo_dist.model.head import PackedCausalLM

log = logging.getLogger(__name__)

# How long a rank on which a forward has failed waits for the others. They compute the same forward, so they
# fail at the same time, or come from its end; or they wait for this rank in the forward, and never come.
# Ranks may compile a kernel before they fail, and then a costlier arrangement may succeed.
LAST_SECONDS, LADDER_SECONDS = 5.0, 60.0

T = TypeVar("T")
Score = Callable[[PackedBatch], Tensor]
"""Log-probs of the targets of a batch on its device, float32 [targets]; may be collective."""


class Agree(Protocol):
    """Collective agreement on a fault."""

    def __call__(self, fault: str, seconds: float | None = None, /) -> str:
        """Return the fault of the lowest rank that has one; empty: none has. Collective.

        Args:
            fault: of this rank; empty: none.
            seconds: how long a rank with a fault waits for the others, which may be in a forward that it
                has left; None: without a limit.

        Raises:
            ConfigError: they have not come.
        """
        ...


def _alone(fault: str, _seconds: float | None = None) -> str:
    return fault


@dataclass(frozen=True)
class CheckedModel:
    """A model under the check at start.

    Attributes:
        model: in evaluation mode, in an engine or not.
        score: scores a batch on `device` by `model`.
        device: of the forward.
        max_length: the longest prompt plus response, in tokens.
        key: the configuration key to name in an error.
        agree: on a fault, by all ranks that check.
    """

    model: PackedCausalLM
    score: Score
    device: torch.device
    max_length: int
    key: str = "model.path"
    agree: Agree = _alone

    @property
    def kind(self) -> str:
        """Return the `model_type`."""
        return str(self.model.causal_lm.config.model_type)

    @property
    def is_int8(self) -> bool:
        """Return whether products with the model's weights may round their inputs to int8."""
        return any(weight.dtype == torch.int8 for weight in self.model.parameters())

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> Tensor:
        """Return the log-probs of a batch, float32 [targets] on the host."""
        return self.score(batch.to(self.device)).float().cpu()

    def attempt(self, work: Callable[[], T], seconds: float) -> tuple[T | None, str]:
        """Return the result of `work`, and no text; or None and the first line of an error. Collective.

        A model can raise anything if it is called in an unusual way. Exhausted memory is raised.

        Args:
            work: makes the same collective calls on all ranks, unless it fails.
            seconds: how long a rank with an error waits for the others.
        """
        result, fault = None, ""
        try:
            result = work()
        except (DeviceMemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            fault = first_line(error)
            log.info("%s, in the check at start:", self.kind, exc_info=True)
        fault = self.agree(fault, seconds)
        return (None if fault else result), fault
