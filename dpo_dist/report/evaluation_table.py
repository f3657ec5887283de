"""An evaluation as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return ""
    ends = row["intervals"].get(key)
    return f"{row[key]:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
