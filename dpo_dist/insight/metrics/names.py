"""Names and order of the values that trackers get, and the best of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_dist.config.metrics import MAIN, PREFIX, metric_of
from dpo_dist.config.schema import Direction

Row = Mapping[str, float]

STEP_AXIS = "train/global_step"
EVALUATED_AT = "eval/global_step"
MARGINS = "eval/margins_histogram"
SAMPLES = "eval/samples_table"
BEST = ("loss", *(PREFIX + key for key in MAIN))
"""Metrics whose best value is in the summary of a tracker."""


class RowOrder(NamedTuple):
    """Place of a row in the order of logging: a step's metrics, then its evaluation."""

    step: float = -1
    is_evaluation: bool = False


def order_of(row: Row) -> RowOrder:
    """Return the place of a metrics row."""
    return RowOrder(row["step"], any(key.startswith(PREFIX) for key in row))


def order_of_sent(summary: Mapping[str, Any]) -> RowOrder:
    """Return the place of the last row sent, from the summary of a wandb run."""
    step = summary.get(STEP_AXIS)
    return RowOrder() if step is None else RowOrder(step, summary.get(EVALUATED_AT) == step)


def wandb_name(key: str) -> str:
    """Return the name that transformers' and TRL's trainers give a metric in W&B."""
    return f"eval/{key.removeprefix(PREFIX)}" if key.startswith(PREFIX) else f"train/{key}"


def wandb_names(row: Row) -> dict[str, float]:
    """Return a row under these names; its step is the x axis, of an evaluation also `eval/global_step`."""
    named = {wandb_name(key): value for key, value in row.items() if key != "step"}
    axes = (STEP_AXIS, EVALUATED_AT) if order_of(row).is_evaluation else (STEP_AXIS,)
    return dict.fromkeys(axes, row["step"]) | named


def best_rows(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Yield each metric of `BEST` that is finite after a step, with the first row that has its best value."""
    for key in BEST:
        found = [row for row in rows if row["step"] > 0 and math.isfinite(row.get(key, math.nan))]
        if found:
            sign = 1 if metric_of(key).best is Direction.lowest else -1
            yield key, min(found, key=lambda row: sign * row[key])


def last_and_best(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the last value of each metric of all starts, and the best values as `best/NAME`.

    wandb itself knows those of the last start only; the axes are its own, because it can be ahead of `rows`.
    """
    last = {wandb_name(key): value for row in rows for key, value in row.items() if key != "step"}
    return last | {f"best/{wandb_name(key)}": row[key] for key, row in best_rows(rows)}
