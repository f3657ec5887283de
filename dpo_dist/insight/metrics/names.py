"""Histogram of the margins of an evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


STEP_AXIS = "train/global_step"
EVALUATED_AT = "eval/global_step"
BEST = {
    "train/loss": "min",
    "eval/loss": "min",
    "eval/rewards/accuracies": "max",
    "eval/rewards/margins": "max",
}
"""Metrics whose best value is in the run's summary as `best/NAME`, beside the last one as `NAME`."""

MARGINS = "eval/margins_histogram"
"""Histogram of the margins of an evaluation's pairs."""
SAMPLES = "eval/samples_table"
"""Table of an evaluation's samples."""


class RowOrder(NamedTuple):
    """Place of a row in the order of logging: a step's metrics, then its evaluation."""

    step: float = -1
    is_evaluation: bool = False


def order_of(row: Mapping[str, Any]) -> RowOrder:
    """Return the place of a metrics row."""
    return RowOrder(row["step"], any(key.startswith("eval_") for key in row))


def order_of_sent(values: Mapping[str, Any]) -> RowOrder:
    """Return the place of the last row sent, from its values or from the summary of its run."""
    if STEP_AXIS not in values:
        return RowOrder()
    step = values[STEP_AXIS]
    return RowOrder(step, values.get(EVALUATED_AT) == step)


def wandb_names(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row with the W&B keys of transformers' and TRL's trainers, so that runs can be compared.

    `eval_loss` becomes `eval/loss`, every other key `train/<key>`; `step` is `train/global_step`, the x axis,
    and of an evaluation also `eval/global_step`.
    """
    named = {}
    for key, value in row.items():
        if key == "step":
            named[STEP_AXIS] = value
        elif key.startswith("eval_"):
            named[f"eval/{key.removeprefix('eval_')}"] = value
        else:
            named[f"train/{key}"] = value
    if order_of(row).is_evaluation:
        named[EVALUATED_AT] = row["step"]
    return named


def last_and_best(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the summary's values of the metrics of all `rows`: wandb knows those of the last start only.

    Each is the last one, a number as in TRL's runs; of a metric of `BEST` there is also the best finite one
    after a step.
    The axes are absent: wandb can be ahead of `rows`, and their values are its own.
    """
    named = [wandb_names(row) for row in rows]
    found: dict[str, Any] = {name: value for values in named for name, value in values.items()}
    for axis in (STEP_AXIS, EVALUATED_AT):
        found.pop(axis, None)
    for name, best in BEST.items():
        after_steps = (values[name] for values in named if name in values and values[STEP_AXIS] > 0)
        finite = [value for value in after_steps if math.isfinite(value)]
        if finite:
            found[f"best/{name}"] = min(finite) if best == "min" else max(finite)
    return found
