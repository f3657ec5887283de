"""Append a run's metrics rows to log_history.json, read them, and write their table and summary at its end.

The file is a JSON list after each row, with a row a line.
"""

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from statistics import median
from typing import Any

from dpo_dist.config.metrics import (
    ACCURACIES,
    AUC,
    CUSTOM,
    GROUP_METRICS,
    MAIN,
    METRICS,
    MISMATCH,
    PAIR_METRICS,
    PREFIX,
    TERMS,
    is_evaluation,
)
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Direction
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.files import for_json

MetricsRow = dict[str, float]
"""Metrics of a logged step or of an evaluation, by name, as in log_history.json."""

# A tracker's summary has the best values of these metrics, summary.json only those of `_BEST`.
METRICS_WITH_BEST = {
    key: 1 if METRICS[key.removeprefix(PREFIX)].best is Direction.lowest else -1
    for key in ("loss", *(PREFIX + key for key in MAIN))
}
"""1 if the lowest value is the best, -1 if the highest is."""
_BEST = ("eval_loss", *(PREFIX + key for key in ACCURACIES))
_FINAL = (*PAIR_METRICS, *TERMS.values(), AUC, MISMATCH)
_SPIKE_ROWS = 100
_FEWEST_ROWS = 50
_EXCURSION = 5.0
_COLLAPSED_NATS = 50.0
_BEGIN, _BETWEEN, _END = b"[\n", b",\n", b"\n]\n"
_EQUAL = 1e-9  # relative difference of means that only rounding makes different
_AFTER_STEP = 0.5


class MetricsLog:
    """The metrics rows of one run, in a file and in memory."""

    def __init__(self, folder: RunFolder, rows: list[MetricsRow]):
        self.folder = folder
        self.rows = rows

    @classmethod
    def open(
        cls,
        folder: RunFolder,
        resume_step: int | None,
        warn: Callable[[str], None] = print,
        *,
        evaluation_is_due: bool = False,
    ) -> "MetricsLog":
        """Start a log, or continue the one in `folder`.

        Rows after `resume_step` (None for a new run) are dropped, because training computes them again; with
        `evaluation_is_due`, also the evaluation at this step. `warn` is called if existing rows are missing
        or replaced.
        """
        end = -1.0
        if resume_step is not None:
            end = resume_step if evaluation_is_due else resume_step + _AFTER_STEP
        stored = read_rows(folder)
        rows = [row for row in stored if log_position(row) <= end]
        if stored and resume_step is None:
            warn("training starts again: an earlier start left no checkpoint; its rows are replaced")
        elif resume_step is not None and not folder.log_history.exists():
            warn(f"metrics up to step {resume_step} are lost: {folder.log_history} is missing")
        with files.staged_file(folder.log_history) as temporary:
            temporary.write_bytes(_BEGIN + _BETWEEN.join(map(_line, rows)) + _END)
        folder.metrics_table.unlink(missing_ok=True)  # it would lack the rows of this start
        return cls(folder, rows)

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, which has a `step`, to the file; raises OSError if the file was moved away."""
        with self.folder.log_history.open("r+b") as file:
            file.seek(-len(_END), os.SEEK_END)
            file.write((_BETWEEN if self.rows else b"") + _line(row) + _END)
        self.rows.append(_known(row))

    def save(self) -> None:
        """Flush the file to disk; raises OSError if it was moved away.

        Call this before a checkpoint of the same step is committed: a run resumed from it needs all rows.
        """
        files.sync(self.folder.log_history)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, then the table of all rows."""
        files.write_json(self.folder.summary, summary)
        write_csv(self.folder, self.rows)


def log_position(row: Mapping[str, float]) -> float:
    """Return a row's position in the log: its step, or half a step later for an evaluation."""
    return row["step"] + _AFTER_STEP * is_evaluation(row)


def _line(row: Mapping[str, float]) -> bytes:
    """Return a row as a line of JSON, with null for nan and infinity."""
    return json.dumps(for_json(row)).encode()


def _known(row: Mapping[str, float | None]) -> MetricsRow:
    """Return a row as it is read from its line, with nan for null."""
    return {
        sys.intern(key): math.nan if value is None or not math.isfinite(value) else value
        for key, value in row.items()
    }


def stored_rows(folder: RunFolder, end: float = math.inf) -> Iterator[MetricsRow]:
    """Yield all rows of a run up to the position `end`; the run may be training, or was killed."""
    if not folder.log_history.exists():
        return
    with folder.log_history.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            content = line.rstrip(_BETWEEN)
            if content in (b"", b"[", b"]") or not line.endswith(b"\n"):  # an unfinished row has no end
                continue
            try:
                row = _known(json.loads(content))
            except ValueError as error:
                raise ConfigError(
                    "the metrics of this run cannot be read",
                    where=f"{folder.log_history}:{number}",
                    got=first_line(error),
                    expected="numbers by their names, as a run writes them",
                    remedy="delete this line",
                ) from error
            if log_position(row) > end:
                return
            yield row


def read_rows(folder: RunFolder, step: float = math.inf) -> list[MetricsRow]:
    """Return the rows of a run up to a step."""
    return list(stored_rows(folder, step + _AFTER_STEP))


def write_csv(folder: RunFolder, rows: Sequence[MetricsRow]) -> None:
    """Write rows as training_metrics.csv, whole or not at all."""
    columns = dict.fromkeys(chain(*sorted(rows, key=is_evaluation)))  # those of steps first
    with (
        files.staged_file(folder.metrics_table) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as table,
    ):
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(map(row.get, columns) for row in rows)


def final_and_best(rows: Sequence[MetricsRow]) -> dict[str, Any]:
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
            by_group = (*(f"{prefix}{metric}/" for metric in GROUP_METRICS), prefix + CUSTOM)
            final |= {key: value for key, value in last.items() if key.startswith(by_group)}
    best_rows = dict[str, MetricsRow]()
    for row in rows:
        note_best(best_rows, row)
    best = {key: best_rows[key] for key in _BEST if key in best_rows}
    return {"final": final, "best": {k: {"value": row[k], "step": row["step"]} for k, row in best.items()}}


def note_best(best: dict[str, MetricsRow], row: MetricsRow) -> None:
    """Make `row` the best row of each metric (`METRICS_WITH_BEST`) in which it beats the best one so far.

    Of equal rows the first one is the best. Step 0 does not count.
    """
    for key, sign in METRICS_WITH_BEST.items():
        value = finite(row, key)
        if value is None or row["step"] == 0:
            continue
        if key not in best or sign * value < sign * best[key][key]:
            best[key] = row


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
    losses = (finite(each, "loss") for each in rows)
    first = next((value for value in losses if value is not None), 0.0)
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
