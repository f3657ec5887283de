"""An evaluation as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from dpo_dist.number_text import counted
from dpo_dist.report.terminal.text_table import aligned, with_interval

_COLUMNS = {
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "both fall": "eval_rewards/both_fall",
    "log-prob/token": "eval_logps/chosen_per_token",
}


def evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table: a row for all pairs and for each label, with 95 % intervals.

    Args:
        results: of `evaluation.results`.
    """
    shown = {title: key for title, key in _COLUMNS.items() if any(key in row for row in results.values())}
    rows = [["evaluation", "pairs", *shown, "calibration error"]]
    for name, row in results.items():
        error = row.get("calibration", {}).get("expected_calibration_error")
        cells = [_cell(row, key) for key in shown.values()]
        rows.append([name, f"{row['eval_pairs']:,}", *cells, "" if error is None else f"{error:.3f}"])
    return [*aligned(rows), *_not_a_number(results)]


def _not_a_number(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a warning about pairs without a margin, if there are any."""
    undefined = next(iter(results.values())).get("calibration", {}).get("not_a_number")
    if not undefined:
        return []
    pairs = counted(undefined, "pair")
    return [
        f"warning: the margin of {pairs} is not a number: counted as wrong, and in no bin of the calibration"
    ]


def _cell(row: Mapping[str, Any], key: str) -> str:
    return with_interval(row[key], row["intervals"].get(key), ".3f") if key in row else ""
