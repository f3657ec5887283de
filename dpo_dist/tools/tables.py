"""Tables of runs, evaluations and comparisons as text, for terminals, pages and model cards."""

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from dpo_dist.config.identity import loss_kinds
from dpo_dist.config.losses import loss_unit
from dpo_dist.config.metrics import ACCURACIES, MAIN, METRICS, PREFIX
from dpo_dist.config.run_folder import RunFolder, checkpoint_name
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import duration, percent, pluralize, size
from dpo_dist.foundation.types import Fields

Ends = Sequence[float] | None

EVALUATION_METRICS = (*ACCURACIES, "rewards/margins", "rewards/both_fall", "logps/chosen_per_token")
_OUTCOMES = {
    RunOutcome.completed: "completed {}",
    RunOutcome.preempted: "stopped after {}; the same command resumes from there",
    RunOutcome.diverged: "diverged after {}",
}


def aligned(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Return one line per row, with aligned columns; the columns `numbers` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in numbers else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def with_interval(value: float | None, ends: Ends, form: str) -> str:
    """Return "0.512 [0.480, 0.544]"; without `ends` the value only, "-" for None."""
    if value is None:
        return "-"
    return f"{value:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")


def closing_table(folder: RunFolder, rows: Sequence[Fields], summary: Fields) -> list[str]:
    """Return the lines printed at the end of a run; facts that `rows` and `summary` lack are left out."""
    lines = [["", "first", "last", "best"]]
    for part, prefix in (("training", ""), ("evaluation", "eval_")):
        for name in MAIN:
            metric = METRICS[name]
            measured = [row[prefix + name] for row in rows if prefix + name in row]
            best = summary.get("best", {}).get(prefix + name)
            at_best = f"{metric.form(best['value'])} at step {int(best['step']):,}" if best else ""
            if measured:
                ends = map(metric.form, (measured[0], measured[-1]))
                lines.append([f"{part} {metric.title}", *ends, at_best])
    outcome = RunOutcome(summary["exit"])
    saved = summary.get("best_checkpoint")
    kept = folder.checkpoints / checkpoint_name(saved["step"]) if saved else ""
    step_note = f" (step {summary['model_step']:,})" if "model_step" in summary else ""
    spent = list[str]()
    if "train_seconds" in summary:
        spent.append(f"{duration(summary['train_seconds'])} of training")
        if "pairs_per_second" in summary:
            unit = loss_unit(loss_kinds(summary.get("settings") or {}))
            spent.append(pluralize(summary.get("pairs_seen", 0), unit))
            spent.append(f"{summary['pairs_per_second']:,.1f} {unit}s/s")
        if shares := [row["mfu"] for row in rows if math.isfinite(row.get("mfu", math.nan))]:
            spent.append(f"MFU {percent(fmean(shares))}")
        if "peak_memory_bytes" in summary:
            spent.append(f"peak memory {size(summary['peak_memory_bytes'])}")
            processes = summary.get("world_size", 1)
            spent += [pluralize(processes, "process", "processes")] if processes > 1 else []
    facts = {
        "run": _OUTCOMES[outcome].format(pluralize(summary["steps"], "step")),
        "time": ", ".join(spent),
        "best": f"{kept} ({saved['metric']} {saved['value']:.4f})" if saved else "",
        "data": ", ".join(
            f"{name}: {counts['kept']:,} of {pluralize(counts['read'], 'record')} kept"
            for name, counts in summary.get("data", {}).items()
            if "read" in counts
        ),
        "reference": describe_reference(summary.get("reference", {})),
        "model": f"{folder.model}{step_note}" if outcome is RunOutcome.completed else "",
        "report": folder.report,
        "metrics": folder.metrics,
        "talk to it": f"dpo-dist chat {shlex.quote(str(folder))}" if outcome is RunOutcome.completed else "",
    }
    table = ["", *aligned(lines, numbers=(1, 2)), ""] if len(lines) > 1 else [""]
    return [*table, *(f"{name:<11}{text}" for name, text in facts.items() if text)]


def describe_reference(report: Fields) -> str:
    """Return the section `reference` of summary.json in words: "cached: 6,403 log-probs computed, ..."."""
    if report.get("mode") != "cached" or not {"computed", "hits"} <= report.keys():
        return str(report.get("mode", ""))
    return f"cached: {pluralize(report['computed'], 'log-prob')} computed, {report['hits']:,} reused"


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
