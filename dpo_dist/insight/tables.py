"""Tables on the terminal: of a run at its end, an evaluation, a comparison."""

import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpo_dist.config.run_folder import RunFolder, checkpoint_name
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import counted, duration, percent, size
from dpo_dist.insight.verdict.facts import mean_over_time


def aligned(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Return each row as a line, with columns as wide as their widest cell; `numbers` go to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in numbers else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def with_interval(value: float, ends: Sequence[float] | None, form: str) -> str:
    """Return "0.512 [0.480, 0.544]"; without `ends` the value only."""
    return f"{value:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")


def wrapped(line: str, width: int) -> list[str]:
    """Return a line of a result, broken between words at `width` columns where that is possible.

    What follows is indented to the text after a label ("time       1 min of training"), else by four columns.
    """
    label = re.match(r"\S+( \S+)* {2,}", line)
    indent = " " * (label.end() if label and label.end() <= width // 2 else 4)
    parts = textwrap.wrap(
        line, max(width, 8), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return parts or [line]


MetricsRow = Mapping[str, float]

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


def closing_table(folder: RunFolder, rows: Sequence[MetricsRow], summary: Mapping[str, Any]) -> list[str]:
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


def _metrics(rows: Sequence[MetricsRow], best: Mapping[str, Mapping[str, float]]) -> list[str]:
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
    return ["", *aligned([["", "first", "last", "best"], *lines], numbers=(1, 2)), ""] if lines else [""]


def _best(folder: RunFolder, checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """Return the best checkpoint in words; "" without `trainer.keep_best`."""
    for one in checkpoints:
        return f"{folder.checkpoints / checkpoint_name(one['step'])} ({one['metric']} {one['value']:.4f})"
    return ""


def _time(rows: Sequence[MetricsRow], summary: Mapping[str, Any]) -> str:
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


Row = Mapping[str, Any]
_MOST_RATES = 6
"""Win rates without the base that are printed; those of more models are on the page only."""


def comparison_table(results: Row) -> list[str]:
    """Return the lines of the tables: the models with 95 % intervals, then the win rates of every two.

    Args:
        results: the content of comparison.json.
    """
    base = results["base"]
    rates = {win["second"]: win for win in results["wins"] if win["first"] == base}
    has_scores = any(model["score"] is not None for model in results["models"])
    titles = ["model", "tokens", "finished", "refusals", f"KL to {base}"]
    rows = [[*titles, *(["score"] if has_scores else []), *([f"wins over {base}"] if rates else [])]]
    for model in results["models"]:
        style = model["style"]
        shares = (percent(style[name]) for name in ("finished", "refusals"))
        kl = _or_dash(model["kl"], model["kl_interval"], ".2f")
        cells = [model["name"], f"{style['length']:.0f}", *shares, kl]
        if has_scores:
            cells.append(_or_dash(model["score"], model["score_interval"], ".3f"))
        if rates:
            cells.append(_over_base(rates.get(model["name"])))
        rows.append(cells)
    judge = "" if results["judge"] is None else f", judged by {results['judge']}"
    lines = [f"comparison on {results['prompts']:,} held-out prompts{judge}", *aligned(rows)]
    others = [win for win in results["wins"] if win["first"] != base]
    if len(others) <= _MOST_RATES:
        lines += [f"{win['second']} over {win['first']}: {_over_base(win)}" for win in others]
    else:
        lines.append(f"{len(others)} more win rates, of models without {base}, are on the page")
    return lines + _notes(results)


def _notes(results: Row) -> list[str]:
    """Return lines about what limits the results."""
    notes = []
    temperature = results["sampling"]["temperature"]
    if temperature != 1 and any(model["kl"] for model in results["models"]):
        notes.append(f"note: responses at temperature {temperature:g}: the KL has a bias, at 1 it has none")
    for model in results["models"]:
        number = model["prompts_encoded_differently"]
        if number:
            notes.append(
                f"note: {model['name']} encodes {number:,} prompts as other tokens than {results['base']}: "
                "another chat template or tokenizer"
            )
    if results["wins"]:
        ties = sum(win["ties"] for win in results["wins"])
        notes.append(f"win rates count {counted(ties, 'tie')} as half" if ties else "win rates: no ties")
    left = sum(results["not_judged"].values())
    return notes + (
        [f"note: not counted, because without a verdict: {counted(left, 'comparison')}"] if left else []
    )


def _over_base(win: Row | None) -> str:
    """Return the win rate of the second model."""
    if win is None:
        return ""
    ends = win["interval"]
    return _or_dash(1 - win["rate"], None if ends is None else [1 - ends[1], 1 - ends[0]], ".3f")


def _or_dash(value: float | None, ends: Sequence[float] | None, form: str) -> str:
    return "-" if value is None else with_interval(value, ends, form)


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
