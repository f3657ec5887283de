"""Collect the results of a sweep: outcomes and final metrics of its points, as JSON and as lines."""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dpo_dist.config.metrics import ALL, MAIN, PREFIX, find_metric
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.files import write_json
from dpo_dist.foundation.text import number
from dpo_dist.tools.pages.charts import Line, chart
from dpo_dist.tools.report.run import PageFacts
from dpo_dist.tools.report.runs import compare_runs
from dpo_dist.tools.sweep.figure import figure_charts, figures, write_figure
from dpo_dist.tools.sweep.points import Points, point_settings
from dpo_dist.tools.sweep.pool import ELSEWHERE

_NOT_TRAINED = "not trained"
_FIGURE = "sweep"  # the name of the figure's files, beside sweep.json
End = tuple[str, str]  # a point's outcome and error


def sweep_results(
    points: Points, ends: Mapping[tuple[str, ...], End], folder: RunFolder, search: Mapping[str, Any]
) -> dict[str, Any]:
    """Write sweep.json, and return its content; `ends` has the points that this start has run."""
    rows = [_point(words, config, ends.get(words, ("", "")), folder) for words, config in points.items()]
    results = {"points": rows, **({"search": search} if search else {})}
    write_json(folder.sweep, results)
    return results


def _point(words: tuple[str, ...], config: RunConfig, end: End, folder: RunFolder) -> dict[str, Any]:
    run = RunFolder(config.run.path)
    facts = PageFacts(run)
    recorded = facts.state.get("outcome", _NOT_TRAINED)
    unfinished = recorded in (RunOutcome.started, RunOutcome.exported)
    outcome, error = end[0] or ("not finished" if unfinished else recorded), end[1]
    row: dict[str, Any] = {"settings": point_settings(words, config)}
    row |= {"run_dir": str(run), "outcome": outcome, "screen": str(folder.point_screen(run))}
    if outcome == RunOutcome.completed:
        final, intervals = facts.section("final"), facts.intervals(ALL)
        names = [PREFIX + name for name in MAIN if PREFIX + name in final] or MAIN
        row["metrics"] = {name: final[name] for name in names if name in final}
        row["intervals"] = {name: intervals[name] for name in row["metrics"] if name in intervals}
    elif error:
        row["error"] = error
    return row


def sweep_lines(results: dict[str, Any], points: Points, page: Path) -> list[str]:
    """Write the page about the points that have started; return its table, and lines about the others."""
    search = results.get("search")
    folders = {words: RunFolder(config.run.path) for words, config in points.items()}
    begun = {run: words for words, run in folders.items() if run.state.is_file()}
    settings = [dict(word.lstrip("+").split("=", 1) for word in words) for words in begun.values()]
    drawn = [] if search else figures(results["points"])
    charts = [_search_chart(search)] if search else []
    lines = list[str]()
    if len(begun) > 1:
        lines = ["", *compare_runs(list(begun), page, charts, figure_charts(drawn), settings), ""]
    files = page.with_name(f"{_FIGURE}.svg"), page.with_name(f"{_FIGURE}.png")
    if drawn:
        write_figure(drawn, *files)
    for row, point in zip(results["points"], points, strict=True):
        words = " ".join(word.lstrip("+") for word in point)
        if "error" in row:
            lines.append(f"{words}: {row['outcome']}: {row['error']} ({row['screen']})")
        elif row["outcome"] in (_NOT_TRAINED, ELSEWHERE):
            lines.append(f"{words}: {row['outcome']}")
    if search and search["best"]:
        words = " ".join(f"{key}={value}" for key, value in search["best"]["settings"].items())
        ties = list(search["values"].values()).count(search["best"]["value"])
        tied = f", one of {ties} trials with this value" if ties > 1 else ""
        lines.append(f"best    {words}: {search['by']} {number(search['best']['value'])}{tied}")
    lines += [f"figure  {files[0]}, {files[1].name}"] if drawn else []
    return [*lines, f"report  {page}"] if len(begun) > 1 else lines


def _search_chart(search: Mapping[str, Any]) -> Markup:
    """Return a chart of the values of a search's completed trials."""
    trials, values = list(search["values"]), list(search["values"].values())
    best = accumulate(values, min if search["is_lowest_best"] else max)
    lines = [Line("best so far", "smooth", trials, list(best)), Line("trial", "evaluation", trials, values)]
    return chart(f"Search: {find_metric(search['by'].removeprefix(PREFIX)).title}", lines, over="trial")
