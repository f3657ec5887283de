"""Lengths at which a model's rotary frequencies change, and which responses can share a prompt for it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RopeLimits:
    """Lengths above which a model's rotary frequencies change, in tokens.

    Attributes:
        longrope: of layers with two sets of frequencies.
        dynamic: of layers with frequencies of their own for each length; None: there are none.
    """

    longrope: tuple[int, ...]
    dynamic: int | None

    def representatives(self, lengths: Counts) -> Counts:
        """Return for each length one for all that have its frequencies; 0: those of short sequences."""
        found = np.zeros_like(lengths)
        for limit in sorted(self.longrope):
            found[lengths > limit] = limit + 1
        return found if self.dynamic is None else np.where(lengths > self.dynamic, lengths, found)

    def prompt_copies(self, lengths: Counts, responses: Counts) -> Counts:
        """Return how often a packed forward computes the prompt of each example, int64 [examples].

        Args:
            lengths: int64 [responses], tokens of each response with its prompt, those of the first example
                first.
            responses: int64 [examples], number of responses of each example.
        """
        examples = np.repeat(np.arange(len(responses)), responses)
        groups = np.unique(np.stack((examples, self.representatives(lengths))), axis=1)
        return np.bincount(groups[0], minlength=len(responses))
