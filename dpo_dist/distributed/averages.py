"""Exponential moving average of the trained weights, sharded as their master weights are."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Averages:
    """Averages of the flat float32 tensors that an optimizer updates, each on the device of its tensor.

    Attributes:
        of_masters: average by tensor, float32.
        decay: share of the average that an update keeps.
    """

    of_masters: dict[Tensor, Tensor]
    decay: float

    @classmethod
    def of(cls, masters: Iterable[Tensor], decay: float) -> "Averages":
        """Return averages that begin with the values of this moment."""
        return cls({master: master.detach().clone() for master in masters}, decay)

    @torch.no_grad()
    def update(self) -> None:
        """Move each average towards its weights: decay * average + (1 - decay) * weight; not collective."""
        for master, average in self.of_masters.items():
            average.lerp_(master, 1 - self.decay)
