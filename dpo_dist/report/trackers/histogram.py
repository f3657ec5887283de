"""Histogram of the margins of an evaluation."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BINS = 64


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in bins of equal width.

    Attributes:
        counts: values in each bin, int64 [bins].
        edges: bounds of the bins, float64 [bins + 1].
    """

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> "Histogram | None":
        """Return the histogram of the finite values; None if there is none."""
        finite = values[np.isfinite(values)].astype(np.float64)
        if not len(finite):
            return None
        counts, edges = np.histogram(finite, bins=_BINS)
        return cls(counts, edges)
