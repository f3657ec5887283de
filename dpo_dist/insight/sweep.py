"""Results of a sweep: its points with outcomes and final metrics, as a table and for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_dist.config.load import Points
from dpo_dist.config.metrics import MAIN, METRICS, PREFIX
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Direction
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.files import for_json, write_text
from dpo_dist.insight.evaluation import ALL
from dpo_dist.insight.pages.run import PageFacts
from dpo_dist.insight.tables import aligned

Fields = dict[str, Any]


def sweep_results(points: Points, ends: Mapping[tuple[str, ...], str], folder: RunFolder) -> Fields:
    """Return the content of sweep.json, and write it; `ends` say how points ended that this start has run."""
    rows = [_point(words, RunFolder.of(points[words]), ends.get(words), folder) for words in points]
    results = {"points": rows, "best": _best(rows)}
    write_text(folder.sweep, json.dumps(for_json(results), indent=1) + "\n")
    return results


def _point(words: tuple[str, ...], run: RunFolder, end: str | None, folder: RunFolder) -> Fields:
    facts = PageFacts(run)
    recorded = facts.state.get("outcome", "not trained")
    unfinished = recorded in (RunOutcome.started, RunOutcome.exported)
    outcome = end or ("not finished" if unfinished else recorded)
    row: Fields = {"settings": dict(word.lstrip("+").split("=", 1) for word in words)}
    row |= {"run_dir": str(run), "outcome": outcome, "screen": str(folder.point_screen(run))}
    if outcome == RunOutcome.completed:
        final, intervals = facts.section("final"), facts.intervals(ALL)
        names = [PREFIX + name for name in MAIN if PREFIX + name in final] or MAIN
        row["metrics"] = {name: final[name] for name in names if name in final}
        row["intervals"] = {name: intervals[name] for name in row["metrics"] if name in intervals}
    elif end is not None and end != RunOutcome.preempted:
        row["error"] = _last_words(folder.point_screen(run))
    return row


def _last_words(screen: Path) -> str:
    """Return the first line of the last error on the screen of a point."""
    lines = screen.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line[:160] for line in reversed(lines) if line.strip() and line[0] != " "), "")


def _best(rows: list[Fields]) -> dict[str, list[int]]:
    """Return the places of the best points by each metric; one of several losses ranks by shares only."""
    is_same_loss = not any(key.startswith("loss") for row in rows for key in row["settings"])
    best = {}
    for name in _metrics(rows):
        metric = METRICS[name.removeprefix(PREFIX)]
        values = {at: row["metrics"][name] for at, row in enumerate(rows) if name in row.get("metrics", ())}
        if len(values) > 1 and (is_same_loss or metric.is_share):
            wanted = (min if metric.best is Direction.lowest else max)(values.values())
            best[name] = [at for at, value in values.items() if value == wanted]
    return best


def _metrics(rows: list[Fields]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("metrics", ())))


def sweep_table(results: Fields) -> list[str]:
    """Return the lines of the table of a sweep; * marks the best point by a metric."""
    rows, best = results["points"], results["best"]
    keys, metrics = list(dict.fromkeys(key for row in rows for key in row["settings"])), _metrics(rows)
    parts = {name: "evaluation" if name.startswith(PREFIX) else "training" for name in metrics}
    titles = [f"{part} {METRICS[name.removeprefix(PREFIX)].title}" for name, part in parts.items()]
    table, notes = [[*keys, *titles, "outcome"]], []
    for at, row in enumerate(rows):
        cells = [row["settings"].get(key, "") for key in keys]
        for name in metrics:
            form, value = METRICS[name.removeprefix(PREFIX)].form, row.get("metrics", {}).get(name)
            ends = row.get("intervals", {}).get(name)
            interval = f" [{form(ends[0])}, {form(ends[1])}]" if ends else ""
            star = "*" if at in best.get(name, ()) else ""
            cells.append("-" if value is None else f"{form(value)}{interval}{star}")
        table.append([*cells, row["outcome"]])
        if "error" in row:
            words = " ".join(f"{key}={value}" for key, value in row["settings"].items())
            notes.append(f"{words}: {row['error']} ({row['screen']})")
    return ["", *aligned(table), "", *notes]
