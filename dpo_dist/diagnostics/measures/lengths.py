"""Distribution of lengths in bounded memory."""

import math

import numpy as np
import numpy.typing as npt

from dpo_dist.diagnostics.findings import PERCENTILES, Distribution

_EXACT = 1024
# 70 bins for each doubling: a bin is 1 % wide.
_BINS_PER_DOUBLING = 70
_DOUBLINGS = 40
_SHOWN_BINS = 32


class LengthSketch:
    """Counts of non-negative whole numbers: exact below 1024, above in bins 1 % wide."""

    def __init__(self) -> None:
        self._counts = np.zeros(_EXACT + _BINS_PER_DOUBLING * _DOUBLINGS, dtype=np.int64)
        self._sum = 0
        self._smallest = math.inf
        self._largest = -math.inf

    def add(self, values: npt.NDArray[np.int64]) -> None:
        """Add values, int64 [n], at least 0."""
        if not len(values):
            return
        above = np.maximum(values, _EXACT)
        binned = _EXACT + np.floor(np.log2(above / _EXACT) * _BINS_PER_DOUBLING).astype(np.int64)
        bins = np.where(values < _EXACT, values, np.minimum(binned, len(self._counts) - 1))
        self._counts += np.bincount(bins, minlength=len(self._counts))
        self._sum += int(values.sum())
        self._smallest = min(self._smallest, int(values.min()))
        self._largest = max(self._largest, int(values.max()))

    def distribution(self) -> Distribution | None:
        """Return the distribution; None without a value."""
        total = int(self._counts.sum())
        if not total:
            return None
        starts = _starts(np.arange(len(self._counts)))
        cumulative = np.cumsum(self._counts)
        ranks = [max(1, math.ceil(percent / 100 * total)) for percent in PERCENTILES]
        found = np.clip(starts[np.searchsorted(cumulative, ranks)], self._smallest, self._largest)
        edges = self._edges()
        counts, _ = np.histogram(np.clip(starts, edges[0], edges[-1]), bins=edges, weights=self._counts)
        return Distribution(
            count=total,
            mean=self._sum / total,
            smallest=self._smallest,
            largest=self._largest,
            percentiles=dict(zip(PERCENTILES, map(float, found), strict=True)),
            edges=tuple(map(float, edges)),
            counts=tuple(map(int, counts)),
        )

    def _edges(self) -> npt.NDArray[np.float64]:
        """Return edges from the smallest to the largest value, whole numbers, wider for larger values."""
        low, high = self._smallest, max(self._largest, self._smallest + 1)
        edges = np.round(np.geomspace(low + 1, high + 1, _SHOWN_BINS + 1) - 1)
        return np.unique(edges)


def _starts(bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the smallest value of each bin."""
    above = _EXACT * 2.0 ** ((bins - _EXACT) / _BINS_PER_DOUBLING)
    return np.where(bins < _EXACT, bins, above)
