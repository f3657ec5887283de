"""Collect the results of a sweep: outcomes and final metrics of its points, as JSON and as lines."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.files import write_json
from dpo_dist.kit import ALL, MAIN, PREFIX, RunConfig, RunFolder
from dpo_dist.tools.pages.charts import draw_charts
from dpo_dist.tools.report.run import PageFacts
from dpo_dist.tools.report.runs import compare_runs
from dpo_dist.tools.sweep.figure import figures
from dpo_dist.tools.sweep.folder import SweepFolder
from dpo_dist.tools.sweep.points import Points, point_settings

_NOT_TRAINED = "not trained"
_FIGURE = "sweep"  # the name of the figure's files, beside sweep.json
End = tuple[str, str]  # a point's outcome and error


def sweep_results(points: Points, ends: Mapping[tuple[str, ...], End], folder: SweepFolder) -> dict[str, Any]:
    """Write sweep.json, and return its content; `ends` has the points that this start has run."""
    rows = [_point(words, config, ends.get(words, ("", "")), folder) for words, config in points.items()]
    results = {"points": rows}
    write_json(folder.sweep, results)
    return results


def _point(words: tuple[str, ...], config: RunConfig, end: End, folder: SweepFolder) -> dict[str, Any]:
    run = RunFolder(config.run.path)
    facts = PageFacts(run)
    outcome, error = end
    if not outcome:
        outcome = facts.state.get("outcome", _NOT_TRAINED)
        if outcome in (RunOutcome.started, RunOutcome.exported):
            outcome = "not finished"
    row = {
        "settings": point_settings(words, config),
        "run_dir": str(run),
        "outcome": outcome,
        "screen": str(folder.point_screen(run)),
    }
    if outcome == RunOutcome.completed:
        final = facts.section("final")
        metrics = _values_of(final, [PREFIX + name for name in MAIN]) or _values_of(final, MAIN)
        row["metrics"] = metrics
        row["intervals"] = _values_of((facts.evaluation.get(ALL) or {}).get("intervals") or {}, metrics)
    elif error:
        row["error"] = error
    return row


def _values_of(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}


def sweep_lines(results: dict[str, Any], points: Points, page: Path) -> list[str]:
    """Write the page about the points that have started; return its table, and lines about the others."""
    runs = list[RunFolder]()
    settings = list[dict[str, str]]()
    for words, config in points.items():
        run = RunFolder(config.run.path)
        if run.state.is_file():
            runs.append(run)
            settings.append(dict(word.lstrip("+").split("=", 1) for word in words))
    plots = figures(results["points"])
    has_page = len(runs) > 1
    lines = list[str]()
    if has_page:
        lines = ["", *compare_runs(runs, page, plots, settings), ""]
    for row, point in zip(results["points"], points, strict=True):
        text = " ".join(word.lstrip("+") for word in point) + f": {row['outcome']}"
        if "error" in row:
            lines.append(f"{text}: {row['error']} ({row['screen']})")
        elif row["outcome"] == _NOT_TRAINED:
            lines.append(text)
    if plots:
        images = [page.with_name(f"{_FIGURE}.{form}") for form in ("svg", "png")]
        draw_charts(plots, images, dpi=200)
        lines.append(f"figure  {images[0]}, {images[1].name}")
    if has_page:
        lines.append(f"report  {page}")
    return lines
