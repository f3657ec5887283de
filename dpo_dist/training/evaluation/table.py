"""The table of an evaluation, for terminals and model cards."""

from collections.abc import Mapping, Sequence

from dpo_dist.config.metrics import ACCURACIES, METRICS, PREFIX
from dpo_dist.foundation.text import aligned, with_interval
from dpo_dist.foundation.types import Fields

EVALUATION_METRICS = (*ACCURACIES, "rewards/margins", "rewards/both_fall", "logps/chosen_per_token")


def evaluation_cells(results: Mapping[str, Fields], metrics: Sequence[str]) -> list[list[str]]:
    """Return a row of titles, then a row of metrics with 95 % intervals for all pairs and for each source."""
    names = [name for name in metrics if any(PREFIX + name in row for row in results.values())]
    unit = "records" if any("eval_good" in row for row in results.values()) else "pairs"
    rows = [["evaluation", unit, *(METRICS[name].title for name in names)]]
    for label, row in results.items():
        keys = [PREFIX + name for name in names]
        cells = [
            with_interval(row[key], row["intervals"].get(key), ".3f") if key in row else "" for key in keys
        ]
        rows.append([label, f"{row['eval_pairs']:,}", *cells])
    return rows


def evaluation_table(results: Mapping[str, Fields]) -> list[str]:
    """Return the table of an evaluation, a line per row."""
    return aligned(evaluation_cells(results, EVALUATION_METRICS))
