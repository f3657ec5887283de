"""Confidence intervals of means over pairs, by bootstrap over prompts.

Pairs of one prompt are not independent: they are drawn together (cluster bootstrap, Cameron, Gelbach and
Miller 2008, doi 10.1162/rest.90.3.414; percentile intervals, Efron 1979). Resamples of equal outcomes are
equal: a share of 0 or 1 has Wilson's interval (1927, doi 10.1080/01621459.1927.10502953) of so many prompts.
"""

from collections.abc import Collection, Mapping
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]

LEVEL = 0.95
FEWEST_PROMPTS = 6
"""Prompts that an interval needs. By an even chance five have the same outcome in 2 * 0.5**5 = 6 % of cases,
and an interval of one outcome has no width."""
_MOST_PROMPTS = 1 << 17
"""Prompts that are resampled one by one; more are put into this many groups, which changes no expectation."""


def bootstrap_intervals(
    measured: Mapping[str, tuple[Column, Column]],
    prompts: npt.NDArray[np.uint64],
    seed: int = 0,
    resamples: int = 1000,
    shares: Collection[str] = (),
    differences: Collection[str] = (),
) -> dict[str, tuple[float, float]]:
    """Return the lower and upper end of the interval of every metric.

    Args:
        measured: by name, values and counts of each pair, float64 [pairs]: the metric is the sum of values
            divided by the sum of counts.
        prompts: [pairs], equal for pairs of the same prompt.
        seed: of the resamples.
        resamples: their number; 0: no intervals.
        shares: names of metrics whose values are outcomes from 0 to 1.
        differences: names of metrics whose values are differences of two such outcomes.

    Returns:
        By name; a metric is absent if fewer than `FEWEST_PROMPTS` have a count, or none in some resample, or
        if a value is not finite.
    """
    measured = {name: each for name, each in measured.items() if np.isfinite(each[0]).all()}
    if not measured or not len(prompts) or not resamples:
        return {}
    _, clusters = np.unique(prompts, return_inverse=True)
    clusters = clusters % _MOST_PROMPTS
    number = int(clusters.max()) + 1
    columns = [column for pair in measured.values() for column in pair]
    table = np.stack([np.bincount(clusters, column, number) for column in columns], axis=1)
    generator = np.random.default_rng(seed)
    totals = np.empty((resamples, len(columns)))
    for resample in range(resamples):
        drawn = np.bincount(generator.integers(0, number, number), minlength=number)
        totals[resample] = drawn @ table
    values, counts = totals[:, ::2], totals[:, 1::2]
    counted = np.count_nonzero(table[:, 1::2], axis=0)
    outside = (1 - LEVEL) / 2
    found = {}
    for index, name in enumerate(measured):
        if counted[index] >= FEWEST_PROMPTS and (counts[:, index] > 0).all():
            low, high = np.quantile(values[:, index] / counts[:, index], (outside, 1 - outside))
            found[name] = float(low), float(high)
            if (name in shares or name in differences) and low == high and low in (-1, 0, 1):
                lowest = -1.0 if name in differences else 0.0
                found[name] = _of_equal_outcomes(float(low), lowest, int(counted[index]))
    return found


def _of_equal_outcomes(share: float, lowest: float, prompts: int) -> tuple[float, float]:
    """Return Wilson's interval of a share of 0 or 1; of a difference, on both sides within -1 and 1."""
    squared = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    width = squared / (prompts + squared)
    return max(share - width, lowest), min(share + width, 1.0)
