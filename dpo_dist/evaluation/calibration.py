"""Calibration of the preferences that reward margins imply (Guo et al. 2017, arXiv 1706.04599)."""

from typing import Any

import numpy as np
import numpy.typing as npt

_BINS = 10


def calibration(margins: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Return the reliability of the model's implied preferences.

    By the Bradley-Terry model, a margin m means the probability sigmoid(m) that the chosen response is
    better. The model's own preference is the response with the larger reward, and its confidence in it
    sigmoid(abs(m)), from 0.5 to 1.

    Args:
        margins: reward of the chosen minus that of the rejected response, [pairs].

    Returns:
        `bins`: of equal width in confidence; those with pairs, each with `low`, `high`, `pairs`, mean
        `confidence` and `accuracy`, the share of pairs whose chosen response the model prefers; a tie counts
        half. `expected_calibration_error`: mean of abs(accuracy - confidence) of the bins, weighted by pairs;
        None without pairs in them. `not_a_number`: pairs whose margin is nan; they are in no bin.
    """
    is_number = ~np.isnan(margins)
    undefined = int(len(margins) - is_number.sum())
    margins = margins[is_number]
    values = np.abs(margins.astype(np.float64))
    confidence = 1 / (1 + np.exp(-values))
    right = (margins > 0) + 0.5 * (margins == 0)
    numbers = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(np.int64), _BINS - 1)
    bins, error = [], 0.0
    for number in range(_BINS):
        of_bin = numbers == number
        if not of_bin.any():
            continue
        mean, accuracy = float(confidence[of_bin].mean()), float(right[of_bin].mean())
        error += abs(accuracy - mean) * of_bin.mean()
        low, high = (0.5 + edge / (2 * _BINS) for edge in (number, number + 1))
        bins.append(
            {"low": low, "high": high, "pairs": int(of_bin.sum()), "confidence": mean, "accuracy": accuracy}
        )
    return {
        "bins": bins,
        "expected_calibration_error": float(error) if bins else None,
        "not_a_number": undefined,
    }
