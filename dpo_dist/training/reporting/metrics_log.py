"""Write and read a run's metrics rows as JSON and CSV, and summarise them for summary.json."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from dpo_dist.config.metrics import ACCURACIES, CUSTOM, MAIN, METRICS, PREFIX, TERMS
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Direction
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import for_json
from dpo_dist.objective.metrics import (
    AUC,
    GROUP_METRICS,
    MARGIN_PERCENTILES,
    MISMATCH,
    PAIR_METRICS,
    MetricPlan,
)
from dpo_dist.training.clock import PHASES

MetricsRow = dict[str, float]
"""Metrics of a logged step or of an evaluation, by name, as in log_history.json."""

_SPEED = ("step_seconds", "pairs_per_second", "tokens_per_second", *(f"time/{phase}" for phase in PHASES))
_OTHERS = ("mfu", "memory/peak_allocated_bytes", "memory/peak_reserved_bytes", "bad_steps", "loss_spikes")
# Metrics whose best value a tracker's summary has; summary.json has those of `_BEST`.
METRICS_WITH_BEST = ("loss", *(PREFIX + key for key in MAIN))
_BEST = ("eval_loss", *(PREFIX + key for key in ACCURACIES))
_FINAL = (*PAIR_METRICS, *TERMS.values(), AUC, MISMATCH)
_SPIKE_ROWS, _FEWEST_ROWS, _EXCURSION = 100, 50, 5.0
_COLLAPSED_NATS = 50.0
_EQUAL = 1e-9  # relative difference of means that only rounding makes different


def csv_columns(plan: MetricPlan | None = None) -> tuple[str, ...]:
    """Return the columns of a new CSV file; the plan of a loss for labelled records has their metrics."""
    measured = PAIR_METRICS
    if plan is not None and plan.loss.terms:
        measured += tuple(TERMS[kind] for kind in plan.loss.kinds)
    if plan is not None and plan.loss.is_unpaired:
        measured = tuple(name for name, (_, group) in plan.rows.items() if not group)
    step_columns = ("step", "epoch", *measured, "grad_norm", "learning_rate", "pairs", "tokens")
    return (*step_columns, *_SPEED, *_OTHERS, *(PREFIX + key for key in measured))


class MetricsLog:
    """The metrics rows of one run, in memory and on disk."""

    def __init__(self, folder: RunFolder, rows: list[MetricsRow], plan: MetricPlan | None = None):
        self.folder = folder
        self.rows = rows
        self._columns = list(dict.fromkeys([*csv_columns(plan), *(key for row in rows for key in row)]))

    @classmethod
    def open(
        cls,
        folder: RunFolder,
        resume_step: int | None,
        say: Callable[[str], None] = print,
        plan: MetricPlan | None = None,
        *,
        owes_evaluation: bool = False,
    ) -> "MetricsLog":
        """Start a log, or continue the one in `folder`.

        Rows after `resume_step` (None for a new run) are dropped, because training computes them again; with
        `owes_evaluation`, also the evaluation at this step. `say` gets a warning if existing rows are missing
        or replaced.
        """
        rows: list[MetricsRow] = []
        if resume_step is None and read_latest_rows(folder):
            say("warning: training starts again: an earlier start left no checkpoint; its rows are replaced")
        elif resume_step is not None:
            if not folder.log_history.exists() and not folder.metrics_table.exists():
                say(f"warning: metrics up to step {resume_step} are lost: {folder.log_history} is missing")
            rows = [row for row in read_latest_rows(folder) if row["step"] <= resume_step]
        if owes_evaluation:
            rows = [row for row in rows if row["step"] != resume_step or "eval_loss" not in row]
        log = cls(folder, rows, plan)
        folder.metrics.mkdir(parents=True, exist_ok=True)
        log.save()
        return log

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, which has a `step`, to the CSV file; a new column rewrites the file."""
        self.rows.append(dict(row))
        if new := [key for key in row if key not in self._columns]:
            self._columns += new
            self._write_csv()
            return
        with self.folder.metrics_table.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def save(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write both files, and `summary.json`, each whole or not at all. JSON has null for nan and infinity.

        Call it before a checkpoint of the same step is committed: a run that resumes from the checkpoint
        needs all rows. Raises OSError if the run directory was moved away.
        """
        self.folder.metrics.stat()
        lines = ",\n".join(json.dumps(for_json(row)) for row in self.rows)
        files.write_text(self.folder.log_history, f"[\n{lines}\n]\n")
        self._write_csv()
        if summary is not None:
            files.write_text(self.folder.summary, json.dumps(for_json(summary), indent=2) + "\n")

    def _write_csv(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        files.write_text(self.folder.metrics_table, text.getvalue())


def read_rows(path: Path) -> list[MetricsRow]:
    """Return the rows of a `log_history.json`, with nan for null."""
    return [
        {key: math.nan if value is None else value for key, value in row.items()}
        for row in json.loads(path.read_bytes())
    ]


def read_latest_rows(folder: RunFolder) -> list[MetricsRow]:
    """Return a run's rows, with the latest ones, which only the CSV file has during the run."""
    try:
        rows = read_rows(folder.log_history) if folder.log_history.exists() else []
    except ValueError as error:
        raise ConfigError(
            "the metrics of this run cannot be read",
            where=str(folder.log_history),
            got=str(error),
            remedy=f"delete this file: {folder.metrics_table.name} has the same rows",
        ) from error
    table = folder.metrics_table.read_text(encoding="utf-8") if folder.metrics_table.exists() else ""
    whole, _, _ = table.rpartition("\n")  # the last line may be unfinished
    return rows + [
        {key: int(value) if value.isdecimal() else float(value) for key, value in row.items() if value}
        for row in islice(csv.DictReader(io.StringIO(whole)), len(rows), None)
    ]


def final_and_best(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return `final` and `best` of `summary.json`, without the evaluation before the first step.

    `final` has metrics of the last logged step and of the last evaluation (its step is `eval_step`). `best`
    has the lowest `eval_loss` and the highest of `ACCURACIES`, the earliest of equal values.
    """
    final: MetricsRow = {}
    for prefix in ("", PREFIX):
        measured = [row for row in rows if row["step"] > 0 and f"{prefix}loss" in row]
        if measured:
            last = measured[-1]
            final[f"{prefix}step"] = last["step"]
            final |= {prefix + key: last[prefix + key] for key in _FINAL if prefix + key in last}
            shown = (*_group_prefixes(prefix), prefix + CUSTOM)
            final |= {key: value for key, value in last.items() if key.startswith(shown)}
    best = {key: {"value": row[key], "step": row["step"]} for key, row in best_rows(rows) if key in _BEST}
    return {"final": final, "best": best}


def best_rows(rows: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield each metric with its best row after step 0, the first of equal ones (`METRICS_WITH_BEST`)."""
    for key in METRICS_WITH_BEST:
        measured = [row for row in rows if row["step"] > 0 and math.isfinite(row.get(key, math.nan))]
        if measured:
            sign = 1 if METRICS[key.removeprefix(PREFIX)].best is Direction.lowest else -1
            yield key, min(measured, key=lambda row: sign * row[key])


def metrics_by_source(rows: Sequence[Mapping[str, float]]) -> dict[str, MetricsRow]:
    """Return, by source, the last value of each of `GROUP_METRICS`, with `eval_` those of evaluations.

    Empty for a run with one source.
    """
    last = {key: value for row in rows if row["step"] > 0 for key, value in row.items()}
    by_source: dict[str, MetricsRow] = {}
    for prefix in ("", PREFIX):
        percentiles = {prefix + key for key in MARGIN_PERCENTILES}
        for metric in _group_prefixes(prefix):
            for key, value in last.items():
                if key.startswith(metric) and key not in percentiles:
                    by_source.setdefault(key.removeprefix(metric), {})[metric.removesuffix("/")] = value
    return by_source


def _group_prefixes(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{metric}/" for metric in GROUP_METRICS)


def finite(row: Mapping[str, float], key: str) -> float | None:
    """Return a row's value, or None if the value is missing or not finite."""
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def loss_before_spike(rows: Sequence[Mapping[str, float]], row: Mapping[str, float]) -> float | None:
    """Return the median loss of `rows` if `row`, the next one, is a spike; else None.

    The median is that of the last 100 losses, at least 50. A spike exceeds this median by more than the
    median itself, by more than the first loss, and by more than five times the largest excess before.
    """
    logged = (float(row["loss"]) for row in reversed(rows) if finite(row, "loss") is not None)
    before = list(islice(logged, _SPIKE_ROWS))
    loss = finite(row, "loss")
    # Most rows return here: a median for each row would be slow.
    if loss is None or len(before) < _FEWEST_ROWS or loss <= max(before):
        return None
    typical = median(before)
    first = next((value for each in rows if (value := finite(each, "loss")) is not None), 0.0)
    threshold = max(_EXCURSION * (max(before) - typical), abs(typical), abs(first))
    return typical if loss - typical > threshold else None


def is_collapsed(row: Mapping[str, float]) -> bool | None:
    """Return whether a step's gradient is 0 because the policy has collapsed; None if the row cannot show it.

    A collapsed policy gives every token the same probability, or makes responses far less likely than a
    random guess. A satisfied loss (hinge, ipo) has no gradient either, but its policy still prefers some
    tokens. A row with responses of one label only cannot show which.
    """
    logps = list(logps_by_side(row).values())
    if row.get("grad_norm") != 0 or not logps:
        return False
    if logps[0] < -_COLLAPSED_NATS:
        return True
    return abs(logps[0] - logps[1]) <= _EQUAL * abs(logps[0]) if len(logps) > 1 else None


def logps_by_side(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row's finite log-probs per token, of `chosen` and `rejected` responses."""
    values = {side: finite(row, f"logps/{side}_per_token") for side in ("chosen", "rejected")}
    return {side: value for side, value in values.items() if value is not None}
