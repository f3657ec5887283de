"""The closing table of a run on the terminal: metrics, time, data, reference, files."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.config.checkpoint_folders import checkpoint_name
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.diagnostics.run_facts import mean_over_time
from dpo_dist.errors import RunOutcome
from dpo_dist.number_text import counted, duration, percent, size

Row = Mapping[str, float]

_METRICS = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "rewards/accuracies", "{:.3f}"),
    ("margin", "rewards/margins", "{:.3f}"),
)
_BEGINNINGS = {
    RunOutcome.completed: "completed {}",
    RunOutcome.preempted: "stopped after {}; the same command resumes from there",
    RunOutcome.diverged: "diverged after {}",
}


def closing_table(folder: RunFolder, rows: Sequence[Row], summary: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table; what `rows` and `summary` lack is not shown.

    Args:
        folder: the run directory.
        rows: of log_history.json.
        summary: the content of summary.json.
    """
    outcome = RunOutcome(summary["exit"])
    files = {"report": folder.report, "metrics": folder.metrics}
    if outcome is RunOutcome.completed:
        files = {"model": folder.model, **files}
    facts = {
        "run": _BEGINNINGS[outcome].format(counted(summary["steps"], "step")),
        "time": _time(rows, summary),
        "best": _best(folder, summary.get("best_checkpoints", [])),
        "data": _data(summary.get("data", {})),
        "reference": describe_reference(summary.get("reference", {})),
        **{name: str(path) for name, path in files.items()},
    }
    return [
        *_metrics(rows, summary.get("best", {})),
        *(f"{name:<11}{text}" for name, text in facts.items() if text),
    ]


def _metrics(rows: Sequence[Row], best: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table of the first, the last and the best value of each metric, between empty lines."""
    lines = []
    for label, prefix in (("training", ""), ("evaluation", "eval_")):
        for title, name, form in _METRICS:
            measured = [row for row in rows if prefix + name in row]
            if not measured:
                continue
            ends = [form.format(row[prefix + name]) for row in (measured[0], measured[-1])]
            found = best.get(prefix + name)
            at_best = f"{form.format(found['value'])} at step {int(found['step']):,}" if found else ""
            lines.append([f"{label} {title}", *ends, at_best])
    if not lines:
        return [""]
    table = [["", "first", "last", "best"], *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    shown = [
        f"{name:<{widths[0]}}  {first:>{widths[1]}}  {last:>{widths[2]}}  {at_best}".rstrip()
        for name, first, last, at_best in table
    ]
    return ["", *shown, ""]


def _best(folder: RunFolder, checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """Return the best checkpoint in words; "" without `trainer.keep_best`."""
    for one in checkpoints:
        return f"{folder.checkpoints / checkpoint_name(one['step'])} ({one['metric']} {one['value']:.4f})"
    return ""


def _time(rows: Sequence[Row], summary: Mapping[str, Any]) -> str:
    if "train_seconds" not in summary:
        return ""
    parts = [f"{duration(summary['train_seconds'])} of training"]
    if "pairs_per_second" in summary:
        speed = f"{summary['pairs_per_second']:,.1f} pairs/s"
        parts.append(f"{counted(summary.get('pairs_seen', 0), 'pair')}, {speed}")
    share = mean_over_time(rows, "mfu")
    if share is not None:
        parts.append(f"MFU {percent(share)}")
    if "peak_memory_bytes" in summary:
        processes = summary.get("world_size", 1)
        parts.append(f"peak memory {size(summary['peak_memory_bytes'])}")
        parts += [counted(processes, "process", "processes")] if processes > 1 else []
    return ", ".join(parts)


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{name}: {counts['kept']:,} of {counted(counts['read'], 'record')} kept"
        for name, counts in data.items()
        if "read" in counts
    )


def describe_reference(report: Mapping[str, Any]) -> str:
    """Return the section `reference` of summary.json in words: "cached, 6,403 log-probs computed, ..."."""
    if "mode" not in report:
        return ""
    if report["mode"] != "cached":
        return str(report["mode"])
    return f"cached: {counted(report['computed'], 'log-prob')} computed, {report['hits']:,} reused"
