"""Smooth and thin the values of curves, for pictures and pages alike."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Item = TypeVar("Item")

_SMOOTHED_SHARE = 0.06


def smoothed(values: FloatArray) -> FloatArray:
    """Return a moving mean: two passes of a centered mean over 6 % of the values.

    Values that are not finite are in no mean and stay as they are.

    Args:
        values: float64 [n].

    Returns:
        float64 [n].
    """
    is_finite = np.isfinite(values)
    half = int(_SMOOTHED_SHARE * int(is_finite.sum()) / 2)
    index = np.arange(len(values))
    first = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, len(values))
    counts = _window_sums(is_finite.astype(np.float64), first, end)
    means = np.where(is_finite, values, 0.0)
    for _ in range(2 if half else 0):
        means = np.where(is_finite, _window_sums(means, first, end) / np.maximum(counts, 1.0), 0.0)
    return np.where(is_finite, means, values)


def _window_sums(values: FloatArray, first: NDArray[np.int64], end: NDArray[np.int64]) -> FloatArray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(sums[end] - sums[first], dtype=np.float64)


def evenly(rows: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` rows at equal distances, the first and the last among them."""
    count = min(len(rows), most)
    return [rows[round(at * (len(rows) - 1) / max(count - 1, 1))] for at in range(count)]


def kept_points(lines: list[FloatArray], most: int) -> NDArray[np.int64]:
    """Return increasing indices of at most about `most` points that show the shape of all lines.

    In each of equal parts of the curve the smallest and the largest value of every line are kept, and the
    first and the last point of the curve.

    Args:
        lines: float64 [n] each; values that are not finite are no extremes.
        most: number of points.
    """
    length = len(lines[0]) if lines else 0
    if length <= most:
        return np.arange(length, dtype=np.int64)
    parts = max(1, most // (2 * len(lines)))
    edges = np.linspace(0, length, parts + 1).astype(np.int64)
    kept = {0, length - 1}
    for values in lines:
        low, high = (
            np.where(np.isfinite(values), values, np.inf),
            np.where(np.isfinite(values), values, -np.inf),
        )
        for start, end in pairwise(edges):
            if np.isfinite(values[start:end]).any():
                kept |= {int(start + low[start:end].argmin()), int(start + high[start:end].argmax())}
    return np.array(sorted(kept), dtype=np.int64)
