"""Number of query-key pairs of attention, with windows or chunks in some layers."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
CountT = TypeVar("CountT", int, Counts)


@dataclass(frozen=True)
class Reach:
    """A limit of the keys that queries see in some layers.

    Attributes:
        tokens: of a sliding window, or of a chunk.
        share: of all layers.
        in_chunks: whether sequences are cut in chunks; else a query sees so many keys, itself included.
    """

    tokens: int
    share: float
    in_chunks: bool = False

    def pairs(self, tokens: Counts) -> Counts:
        """Return the number of query-key pairs of sequences of these numbers of tokens, in one layer."""
        if self.in_chunks:
            whole, rest = np.divmod(tokens, self.tokens)
            return whole * causal_pairs(self.tokens) + causal_pairs(rest)
        before = np.minimum(tokens, self.tokens)
        return causal_pairs(before) + (tokens - before) * self.tokens


def causal_pairs(tokens: CountT) -> CountT:
    """Return the number of query-key pairs of sequences in which tokens see all earlier tokens."""
    return tokens * (tokens + 1) // 2
