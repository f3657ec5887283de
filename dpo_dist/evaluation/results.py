"""Results of an evaluation: metrics of all pairs and of each label, with intervals and calibration."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.evaluation.calibration import calibration
from dpo_dist.evaluation.intervals import Column, bootstrap_intervals
from dpo_dist.objective.metrics import BUCKETS, LENGTH_BORDERS, MetricPlan
from dpo_dist.objective.pair_values import PairValues

ALL = "all"
"""The name of the results of all pairs."""
_SHARES = ("rewards/accuracies", "rewards/both_fall")
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Resampling:
    """The settings of the intervals: `resamples` of the prompts, drawn with `seed`."""

    resamples: int
    seed: int


def results_name(label: str) -> str:
    """Return the name of a label's results: the label, but not the name of the results of all pairs."""
    return f"{ALL} (source)" if label == ALL else label


def results(
    means: Mapping[str, float],
    values: PairValues,
    labels: Mapping[str, Mask],
    prompts: npt.NDArray[np.uint64],
    plan: MetricPlan,
    resampling: Resampling,
) -> dict[str, dict[str, Any]]:
    """Return the results of all pairs under `all`, and of each label under its `results_name`.

    Args:
        means: exact means of all metrics of `plan`.
        values: of every pair.
        labels: for each label of the sources, whether a pair has it, [pairs].
        prompts: hash of each pair's prompt, [pairs].
        plan: the metrics of the evaluation.
        resampling: of the intervals.

    Returns:
        Each with the keys of an evaluation's row in log_history.json and `eval_prompts`, their number;
        `intervals`, [low, high] of metrics that are means over pairs or tokens; and `calibration`, unless
        pairs have one response.
    """
    whole = np.ones(len(values), dtype=np.bool_)
    found = {ALL: _of_group(whole, values, prompts, plan, resampling)}
    divided = {f"{name}/{label}" for name in plan.of_sources for label in plan.labels}
    found[ALL] |= {f"eval_{name}": value for name, value in means.items() if name not in divided}
    for label, members in labels.items():
        name = results_name(label)
        found[name] = _of_group(members, values, prompts, plan, resampling)
        suffix = f"/{label}" if plan.labels else ""
        found[name] |= {
            f"eval_{metric}": means[metric + suffix] for metric in plan.of_sources if metric + suffix in means
        }
    return found


def _of_group(
    members: Mask,
    values: PairValues,
    prompts: npt.NDArray[np.uint64],
    plan: MetricPlan,
    resampling: Resampling,
) -> dict[str, Any]:
    """Return the results of some pairs, as far as the values of single pairs decide them."""
    own = PairValues(*(vars(values)[field.name][members] for field in fields(values)))
    measured = _measured(own, plan)
    row = {
        f"eval_{name}": float(column.sum() / counts.sum())
        for name, (column, counts) in measured.items()
        if counts.sum()
    }
    shares = {name for name in measured if name.startswith(_SHARES)}
    intervals = bootstrap_intervals(measured, prompts[members], resampling.seed, resampling.resamples, shares)
    found: dict[str, Any] = {
        **row,
        "eval_pairs": len(own),
        "eval_prompts": len(np.unique(prompts[members])),
        "intervals": {f"eval_{name}": list(ends) for name, ends in intervals.items()},
    }
    if not plan.loss.is_one_sided and len(own):
        found |= {f"eval_{name}": value for name, value in own.margin_percentiles().items()}
        found["calibration"] = calibration(own.margin)
    return found


def _measured(values: PairValues, plan: MetricPlan) -> dict[str, tuple[Column, Column]]:
    """Return values and counts of each pair by metric: those of `plan` that values of single pairs decide."""
    margins = values.margin
    is_missing = np.isnan(margins)  # a comparison with it is False
    right = np.where(is_missing, np.nan, (margins > 0) + 0.5 * (margins == 0))
    falls = (values.logp_chosen < values.reference_chosen) & (
        values.logp_rejected < values.reference_rejected
    )
    ones = np.ones(len(values))
    has_reference = np.isfinite(values.reference_chosen)
    columns: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {
        "rewards/chosen": (values.reward_chosen, ones),
        "rewards/rejected": (values.reward_rejected, ones),
        "rewards/accuracies": (right, ones),
        "rewards/margins": (margins, ones),
        "rewards/both_fall": (np.where(is_missing, np.nan, falls), has_reference),
        "logps/chosen": (values.logp_chosen, ones),
        "logps/rejected": (values.logp_rejected, ones),
        "logps/chosen_per_token": (values.logp_chosen, values.tokens_chosen),
        "logps/rejected_per_token": (values.logp_rejected, values.tokens_rejected),
        "tokens/chosen": (values.tokens_chosen, ones),
        "tokens/rejected": (values.tokens_rejected, ones),
    }
    buckets = np.digitize(np.maximum(values.tokens_chosen, values.tokens_rejected), LENGTH_BORDERS)
    found = {
        name: (column.astype(np.float64), counts.astype(np.float64))
        for name, (column, counts) in columns.items()
        if name in plan.of_pairs
    }
    for name in plan.of_lengths:
        for number, bucket in enumerate(BUCKETS):
            inside = buckets == number
            own = np.where(inside, found[name][0], 0.0)  # a value that is not finite is of its bucket only
            found[f"{name}_by_length/{bucket}"] = own, inside.astype(np.float64)
    return found
