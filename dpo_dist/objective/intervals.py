"""Intervals of means and shares: by resampling prompts, and by Wilson's formula."""

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping
from statistics import NormalDist
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)

RESAMPLES = 1000
LEVEL = 0.95
ENDS = (1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2
FEWEST_PROMPTS = 6
"""Fewest prompts for an interval. Five fair coins agree, and would give an interval of width 0, in
2 * 0.5**5 = 6 % of cases: more than the 5 % in which a 95 % interval may be wrong."""


def bootstrap_intervals(
    metrics: Mapping[Name, tuple[Column, Column]],
    prompts: npt.NDArray[np.uint64],
    seed: int = 0,
    lowest: Mapping[Name, float] = MappingProxyType({}),
) -> dict[Name, tuple[float, float]]:
    """Return the lower and upper end of each metric's 95 % interval.

    `metrics` has each metric's values and counts, float64 [pairs]: the metric is the sum of values divided
    by the sum of counts. `prompts`, [pairs], are equal for pairs of the same prompt, which are resampled
    together. `lowest` is a metric's lower bound: 0 for a rate, -1 for a difference of rates. A metric is left
    out if fewer than `FEWEST_PROMPTS` prompts have a count, if a resample has none, or if a value is not
    finite.
    """
    metrics = {name: columns for name, columns in metrics.items() if np.isfinite(columns[0]).all()}
    if not metrics or not len(prompts):
        return {}
    _, clusters = np.unique(prompts, return_inverse=True)
    number = int(clusters.max()) + 1
    columns = itertools.chain.from_iterable(metrics.values())
    table = np.stack([np.bincount(clusters, column, number) for column in columns], axis=1)
    totals = np.stack([times @ table for times in resamples(number, seed)])
    values = totals[:, ::2]
    counts = totals[:, 1::2]
    prompts_of_metric = np.count_nonzero(table[:, 1::2], axis=0)
    intervals = {}
    for index, name in enumerate(metrics):
        if prompts_of_metric[index] >= FEWEST_PROMPTS and (counts[:, index] > 0).all():
            low, high = map(float, np.quantile(values[:, index] / counts[:, index], ENDS))
            if name in lowest:
                low, high = with_width(low, high, int(prompts_of_metric[index]), lowest[name])
            intervals[name] = low, high
    return intervals


def resamples(number: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield for each resample how often each of `number` prompts is drawn, int64 [number]."""
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(generator.integers(0, number, number), minlength=number)


def with_width(low: float, high: float, prompts: int, lowest: float) -> tuple[float, float]:
    """Return the interval; where all resamples agree on -1, 0 or 1, widened by Wilson's formula."""
    if low != high or low not in (-1, 0, 1):
        return low, high
    width = wilson_interval(0.0, prompts, NormalDist().inv_cdf((1 + LEVEL) / 2))[1]
    return max(low - width, lowest), min(low + width, 1.0)


def wilson_interval(successes: float, trials: int, standard_errors: float) -> tuple[float, float]:
    """Return Wilson's interval of a share (doi:10.1080/01621459.1927.10502953).

    SciPy's function takes whole `successes` only; here a tie can count as half a success.
    """
    share = successes / trials
    squared = standard_errors**2
    centre = (share + squared / (2 * trials)) / (1 + squared / trials)
    half = standard_errors / (1 + squared / trials)
    half *= math.sqrt(share * (1 - share) / trials + squared / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
