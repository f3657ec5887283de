"""Charts of metrics rows, for pages and as images."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.foundation import files
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import number
from dpo_dist.kit import ACCURACIES, AUC, CUSTOM, METRICS, PREFIX, find_metric
from dpo_dist.tools.pages.blocks import COLORS, Chart, FloatArray, Line, LineRole

Rows = Sequence[Mapping[str, float]]

_SMOOTHED_SHARE = 0.06
_WIDE = 100  # a logarithmic axis whose ends have a smaller ratio has ticks within a decade
_LOGARITHMIC = "Gradient norm"
_IN_IMAGE = ("loss", *ACCURACIES, "rewards/margins", "rewards/chosen", "grad_norm", "learning_rate")
"""Metrics whose charts training_curves.png has; of the accuracies the one that the run has."""


def smoothed(values: FloatArray) -> FloatArray:
    """Return two passes of a centred mean over 6 % of the values, few ones as they are; gaps (nan) stay."""
    is_known = np.isfinite(values)
    half = int(_SMOOTHED_SHARE * is_known.sum() / 2)
    if half == 0:
        return values

    def window(values: FloatArray) -> FloatArray:
        sums = np.cumsum(np.pad(values, (half + 1, half)))  # a convolution is quadratic in long runs
        return np.asarray(sums[2 * half + 1 :] - sums[: -2 * half - 1])

    means = np.where(is_known, values, 0.0)
    counts = np.maximum(1.0, window(is_known.astype(np.float64)))
    for _ in range(2):
        means = np.where(is_known, window(means) / counts, 0.0)
    return np.where(is_known, means, math.nan)


def charts_of_run(rows: Rows) -> list[Chart]:
    """Return all charts of a run that have a value."""
    charts = list[Chart]()
    steps = [row for row in rows if "loss" in row]
    for title, keys in _metrics_by_chart(rows).items():
        lines = list[Line]()
        for key in keys:
            lines += _lines(rows, key, find_metric(key).title if len(keys) == 1 else _part(key))
        if "loss" in keys:
            lines += _spikes(steps)
        charts += _chart(title, lines, keys[0], "step")
    return charts


@dataclass(frozen=True)
class Curves:
    """The rows of a run, in which `step` counts pairs; runs with the same label share a colour."""

    label: str
    kind: str  # of its loss
    rows: Rows


def charts_of_runs(runs: Sequence[Curves], over: str, apart: tuple[str, ...]) -> list[Chart]:
    """Return a chart over pairs for each metric, with the moving mean and the evaluations of each run.

    Metrics whose names start with one of `apart` have a chart for each kind of loss.
    """
    charts = list[Chart]()
    for title, keys in _metrics_by_chart(list(chain(*(run.rows for run in runs)))).items():
        for key in keys:
            name = title if len(keys) == 1 else f"{title}: {_part(key)}"
            for kind in dict.fromkeys(run.kind if key.startswith(apart) else "" for run in runs):
                lines = list[Line]()
                for run in runs:
                    if kind in ("", run.kind):
                        lines += [line for line in _lines(run.rows, key, run.label) if line.role != "light"]
                charts += _chart(f"{name}, {kind}" if kind else name, lines, key, over)
    return charts


def _metrics_by_chart(rows: Rows) -> dict[str, list[str]]:
    """Return the names of the metrics of each chart; a custom metric has its own."""
    charts = dict[str, list[str]]()
    for name, metric in METRICS.items():
        if metric.chart:
            charts.setdefault(metric.chart, []).append(name)
    for name in dict.fromkeys(key.removeprefix(PREFIX) for key in chain(*rows)):
        if name.startswith(CUSTOM) and name.count("/") == 1:
            charts[name] = [name]
    return charts


def _part(key: str) -> str:
    """Return what a metric is of in its chart: "chosen" or "rejected"."""
    return key.rsplit("/", 1)[-1].removesuffix("_per_token")


def _chart(title: str, lines: Sequence[Line], key: str, over: str) -> Iterator[Chart]:
    """Yield a chart if it has a line."""
    if lines:
        unit = find_metric(key).unit
        yield Chart(title, lines, unit, over, has_log_values=title.startswith(_LOGARITHMIC))


def _lines(rows: Rows, key: str, label: str) -> Iterator[Line]:
    """Yield a metric's lines: values, their moving mean where they are many, and values of evaluations."""
    steps = [row for row in rows if "loss" in row]
    if any(key in row for row in steps):
        xs = [row["step"] for row in steps]
        values = Line(label, xs, [row.get(key, math.nan) for row in steps])
        means = smoothed(values.values)
        if key == "learning_rate" or np.array_equal(means, values.values, equal_nan=True):
            yield values
        else:
            yield Line(label, xs, values.ys, "light")
            yield Line(label, xs, means.tolist(), "mean")
    evaluations = [row for row in rows if PREFIX + key in row]
    if evaluations:
        ys = [row[PREFIX + key] for row in evaluations]
        yield Line(label, [row["step"] for row in evaluations], ys, "evaluation")


def _spikes(steps: Rows) -> Iterator[Line]:
    """Yield the losses of the rows that count one more spike."""
    most = accumulate((row.get("loss_spikes", 0.0) for row in steps), max, initial=0.0)
    risen = [row for row, before in zip(steps, most, strict=False) if row.get("loss_spikes", 0.0) > before]
    if risen:
        yield Line("spike", [row["step"] for row in risen], [row["loss"] for row in risen], "spike")


_STYLES: Mapping[LineRole, Mapping[str, Any]] = {
    "light": {"linewidth": 1.2, "alpha": 0.5},
    "mean": {"linewidth": 2.0},
    "evaluation": {"linewidth": 0.9, "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "spike": {"linestyle": "", "marker": "v", "markersize": 7},
    "point": {"marker": "o"},
}


def draw_charts(charts: Sequence[Chart], paths: Sequence[Path], title: str = "", dpi: int = 100) -> None:
    """Draw charts to files in the formats of their names, three beside each other, each file whole."""
    from matplotlib import rc_context  # noqa: PLC0415  (slow; only rank 0 draws)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogLocator, MaxNLocator  # noqa: PLC0415

    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(16 / 3 * columns, 4 * rows), dpi=dpi)
        # Without a search for free space, which takes half of the time.
        figure.subplots_adjust(0.15 / columns, 0.16 / rows, 1 - 0.03 / columns, 1 - 0.2 / rows, 0.2, 0.35)
        canvas = FigureCanvasAgg(figure)
        figure.suptitle(printable(title))
        for at, chart in enumerate(charts):
            axes = figure.add_subplot(rows, columns, at + 1)
            axes.set_title(chart.title, loc="left", y=1.0)
            axes.set(xlabel=printable(chart.over), xscale="log" if chart.is_log else "linear")
            axes.set_yscale("log" if chart.has_log_values else "linear")
            axes.grid(alpha=0.3)
            for line in chart.lines:
                repeats, color = divmod(chart.labels.index(line.label), len(COLORS))
                style: dict[str, Any] = {"linestyle": "--" if repeats % 2 else "-"}
                style |= _STYLES.get(line.role, {})
                style["color"] = COLORS[color]
                style["capsize"] = 3 + 2 * color  # so that no bar hides the ends of another
                values = line.values
                spreads = [math.nan if ends is None else (ends[1] - ends[0]) / 2 for ends in line.ends]
                axes.errorbar(line.xs, values, spreads or None, label=printable(line.name), **style)
            low, high = axes.get_ylim()
            if chart.has_log_values:
                is_wide = high > _WIDE * low
                axes.yaxis.set_major_locator(LogLocator(numticks=6) if is_wide else MaxNLocator(5))
                axes.yaxis.set_major_formatter(lambda value, _: number(value))
                axes.minorticks_off()
            if chart.ticks:
                axes.set_xticks(list(chart.ticks), list(map(printable, chart.ticks.values())))
                axes.minorticks_off()
            if chart.lines:
                axes.legend(frameon=False)
        for path in paths:
            with files.staged_file(path) as temporary:
                canvas.print_figure(temporary, format=path.suffix[1:])


def draw_curves(rows: Rows, path: Path, title: str) -> None:
    """Draw metrics rows to the PNG file `path`, 1600 pixels wide, whole or not at all."""
    absent = ACCURACIES[0] if any(AUC in row for row in rows) else AUC
    titles = [METRICS[name].chart for name in _IN_IMAGE if name != absent]
    charts = {chart.title: chart for chart in charts_of_run(rows)}
    draw_charts([charts.get(name, Chart(name, [])) for name in titles], [path], title)
