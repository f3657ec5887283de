"""The metrics rows of a run, in files that grow with it: JSON and CSV; and what its summary has of them."""

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
"""The metrics of a logged step or of an evaluation by name, as in log_history.json."""

_SPEED = ("step_seconds", "pairs_per_second", "tokens_per_second", *(f"time/{phase}" for phase in PHASES))
_OTHERS = ("mfu", "memory/peak_allocated_bytes", "memory/peak_reserved_bytes", "bad_steps", "loss_spikes")
# Metrics whose best value is in the summary of a tracker; summary.json has two of them.
METRICS_WITH_BEST = ("loss", *(PREFIX + key for key in MAIN))
_BEST = ("eval_loss", *(PREFIX + key for key in ACCURACIES))
_FINAL = (*PAIR_METRICS, *TERMS.values(), AUC, MISMATCH)
_SPIKE_ROWS, _FEWEST_ROWS, _EXCURSION = 100, 50, 5.0
_COLLAPSED_NATS = 50.0
_EQUAL = 1e-9  # relative difference of means that only rounding makes different


def columns_of(plan: MetricPlan | None = None) -> tuple[str, ...]:
    """Return the columns of a new CSV file; columns of labelled records are in their loss's plan."""
    measured = PAIR_METRICS
    if plan is not None and plan.loss.terms:
        measured += tuple(TERMS[kind] for kind in plan.loss.kinds)
    if plan is not None and plan.loss.is_unpaired:
        measured = tuple(name for name, (_, group) in plan.rows.items() if not group)
    of_step = ("step", "epoch", *measured, "grad_norm", "learning_rate", "pairs", "tokens")
    return (*of_step, *_SPEED, *_OTHERS, *(PREFIX + key for key in measured))


class MetricsLog:
    """The metrics rows of one run, in memory and on disk."""

    def __init__(self, folder: RunFolder, rows: list[MetricsRow], plan: MetricPlan | None = None):
        self.folder = folder
        self.rows = rows
        self._columns = list(dict.fromkeys([*columns_of(plan), *(key for row in rows for key in row)]))

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

        Rows after `resume_step` (None: of a new run) are computed again, with `owes_evaluation` the
        evaluation after it, too. `say` gets a warning if there is no file of the existing rows, or if they
        are replaced.
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
        history = cls(folder, rows, plan)
        folder.metrics.mkdir(parents=True, exist_ok=True)
        history.save()
        return history

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row with its `step` to the CSV file; a new column makes it write the file anew."""
        self.rows.append(dict(row))
        if new := [key for key in row if key not in self._columns]:
            self._columns += new
            self._write_csv()
            return
        with self.folder.metrics_table.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def save(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write both files, and `summary.json`, whole or not at all. What is not finite is null in JSON.

        Call it before a checkpoint of the same step is committed, so that a resumed run finds all its rows.
        A run directory that was moved away is not created again.
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
    """Read the rows of a `log_history.json`; null becomes nan."""
    return [
        {key: math.nan if value is None else value for key, value in row.items()}
        for row in json.loads(path.read_bytes())
    ]


def read_latest_rows(folder: RunFolder) -> list[MetricsRow]:
    """Return the rows of a run, also those that are only in the CSV file, which grows during the run."""
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
    """Return `final` and `best` of `summary.json`; the evaluation before the first step is no result.

    `final` has metrics of the last logged step and of the last evaluation (its step is `eval_step`); `best`
    has the lowest `eval_loss` and the highest of `ACCURACIES`, the earliest of equal ones.
    """
    final: MetricsRow = {}
    for prefix in ("", PREFIX):
        measured = [row for row in rows if row["step"] > 0 and f"{prefix}loss" in row]
        if measured:
            last = measured[-1]
            final[f"{prefix}step"] = last["step"]
            final |= {prefix + key: last[prefix + key] for key in _FINAL if prefix + key in last}
            shown = (*_grouped(prefix), prefix + CUSTOM)
            final |= {key: value for key, value in last.items() if key.startswith(shown)}
    best = {key: {"value": row[key], "step": row["step"]} for key, row in best_rows(rows) if key in _BEST}
    return {"final": final, "best": best}


def best_rows(rows: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield each of `METRICS_WITH_BEST` that is finite after a step, with the first row of its best value."""
    for key in METRICS_WITH_BEST:
        measured = [row for row in rows if row["step"] > 0 and math.isfinite(row.get(key, math.nan))]
        if measured:
            sign = 1 if METRICS[key.removeprefix(PREFIX)].best is Direction.lowest else -1
            yield key, min(measured, key=lambda row: sign * row[key])


def metrics_by_source(rows: Sequence[Mapping[str, float]]) -> dict[str, MetricsRow]:
    """Return, by source, the last value of each metric of `GROUP_METRICS`, those of evaluations with `eval_`.

    A run with one source has none.
    """
    last = {key: value for row in rows if row["step"] > 0 for key, value in row.items()}
    by_source: dict[str, MetricsRow] = {}
    for prefix in ("", PREFIX):
        percentiles = {prefix + key for key in MARGIN_PERCENTILES}
        for metric in _grouped(prefix):
            for key, value in last.items():
                if key.startswith(metric) and key not in percentiles:
                    by_source.setdefault(key.removeprefix(metric), {})[metric.removesuffix("/")] = value
    return by_source


def _grouped(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{metric}/" for metric in GROUP_METRICS)


def finite(row: Mapping[str, float], key: str) -> float | None:
    """Return the value of a row, or None if it is missing or not finite."""
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def usual_loss(rows: Sequence[Mapping[str, float]], row: Mapping[str, float]) -> float | None:
    """Return the median loss before a row after `rows`, if the row is a spike.

    A spike is above the median of the last 100 losses (at least 50) by more than five times the largest among
    them, and by more than that median and the first loss.
    """
    logged = (float(row["loss"]) for row in reversed(rows) if finite(row, "loss") is not None)
    before = list(islice(logged, _SPIKE_ROWS))
    loss = finite(row, "loss")
    # Seldom true, and a median of every window is slow.
    if loss is None or len(before) < _FEWEST_ROWS or loss <= max(before):
        return None
    usual = median(before)
    first = next((value for each in rows if (value := finite(each, "loss")) is not None), 0.0)
    least = max(_EXCURSION * (max(before) - usual), abs(usual), abs(first))
    return usual if loss - usual > least else None


def is_collapsed(row: Mapping[str, float]) -> bool | None:
    """Return whether the policy of a step has no gradient, and gives responses no usable probability.

    Every token has the same probability, or responses are far less likely than any guess. A satisfied loss
    (hinge, ipo) has no gradient either, but its policy still prefers some tokens. None: a row with responses
    of one label alone does not tell.
    """
    logps = list(logps_by_side(row).values())
    if row.get("grad_norm") != 0 or not logps:
        return False
    if logps[0] < -_COLLAPSED_NATS:
        return True
    return abs(logps[0] - logps[1]) <= _EQUAL * abs(logps[0]) if len(logps) > 1 else None


def logps_by_side(row: Mapping[str, float]) -> dict[str, float]:
    """Return the finite log-probs per token of chosen and rejected responses, as far as a row has both."""
    values = {side: finite(row, f"logps/{side}_per_token") for side in ("chosen", "rejected")}
    return {side: value for side, value in values.items() if value is not None}
