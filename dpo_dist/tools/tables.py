"""Tables of runs, evaluations and comparisons as text, for terminals, pages and model cards."""

import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import aligned, duration, percent, pluralize, size
from dpo_dist.foundation.types import Fields
from dpo_dist.kit import MAIN, METRICS, LossKind, RunFolder, loss_kinds, loss_unit
from dpo_dist.tools.pages.blocks import Table

_OUTCOMES = {
    RunOutcome.completed: "completed {}",
    RunOutcome.preempted: "stopped after {}; the same command resumes from there",
    RunOutcome.diverged: "diverged after {}",
}


def closing_table(folder: RunFolder, rows: Sequence[Fields], summary: Fields) -> list[str]:
    """Return the lines printed at the end of a run; facts that `rows` and `summary` lack are left out."""
    results = result_table(rows, summary)
    lines = ["", *aligned([results.titles, *results.rows], numbers=(1, 2)), ""] if results.rows else [""]
    return [*lines, *(f"{name:<11}{text}" for name, text in closing_facts(folder, rows, summary).items())]


def result_table(rows: Sequence[Fields], summary: Fields) -> Table:
    """Return the first, last and best values of the main metrics."""
    lines = []
    for part, prefix in (("training", ""), ("evaluation", "eval_")):
        for name in MAIN:
            metric = METRICS[name]
            values = [row[prefix + name] for row in rows if prefix + name in row]
            best = (summary.get("best") or {}).get(prefix + name)
            at_best = f"{metric.form(best['value'])} at step {int(best['step']):,}" if best else ""
            if values:
                line = [f"{part} {metric.title}", metric.form(values[0]), metric.form(values[-1]), at_best]
                lines.append(line)
    return Table(["", "first", "last", "best"], lines)


def closing_facts(folder: RunFolder, rows: Sequence[Fields], summary: Fields) -> dict[str, str]:
    """Return how a run ended, its time, and where its results are."""
    facts: dict[str, str] = {}
    outcome = RunOutcome(summary["exit"])
    ended = _OUTCOMES[outcome].format(pluralize(summary["steps"], "step"))
    facts["run"] = ", ".join([ended, *_time_facts(rows, summary)])
    checkpoint = summary.get("best_checkpoint")
    if checkpoint:
        path = folder.checkpoint(checkpoint["step"])
        facts["best"] = f"{path} ({checkpoint['metric']} {checkpoint['value']:.4f})"
    if outcome is RunOutcome.completed:
        step_note = f" (step {summary['model_step']:,})" if "model_step" in summary else ""
        facts["model"] = f"{folder.model}{step_note}"
    facts["report"] = str(folder.report)
    has_scores = LossKind.reward in loss_kinds(summary.get("settings") or {})
    if outcome is RunOutcome.completed and not has_scores:
        facts["talk to it"] = f"{_program()} chat {shlex.quote(str(folder))}"
    return facts


def _program() -> str:
    """Return how the shell starts this installation of the package: by name, if it finds this one."""
    beside = Path(sys.executable).with_name("dpo-dist")
    if shutil.which("dpo-dist") == str(beside):
        return beside.name
    return f"{shlex.quote(sys.executable)} -m dpo_dist"


def _time_facts(rows: Sequence[Fields], summary: Fields) -> Iterator[str]:
    if "train_seconds" not in summary:
        return
    yield f"{duration(summary['train_seconds'])} of training"
    if "pairs_per_second" in summary:
        unit = loss_unit(loss_kinds(summary.get("settings") or {}))
        yield pluralize(summary.get("pairs_seen", 0), unit)
        yield f"{summary['pairs_per_second']:,.1f} {unit}s/s"
    shares = [row["mfu"] for row in rows if math.isfinite(row.get("mfu", math.nan))]
    if shares:
        yield f"MFU {percent(fmean(shares))}"
    if "peak_memory_bytes" in summary:
        yield f"peak memory {size(summary['peak_memory_bytes'])}"
        if summary.get("world_size", 1) > 1:
            yield pluralize(summary["world_size"], "process", "processes")
