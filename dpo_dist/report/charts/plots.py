"""Training curves of a run as one image: small multiples, a chart for each panel of `curves`.

Faint lines are logged values, strong ones their moving mean, rings are evaluations.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dpo_dist import atomic
from dpo_dist.number_text import number
from dpo_dist.report.charts.axes import Axis, tick_texts, value_axis
from dpo_dist.report.charts.curves import PANELS, Curves, Panel, Rows
from dpo_dist.report.charts.script import LIGHT_COLORS
from dpo_dist.report.charts.smoothing import FloatArray, kept_points
from dpo_dist.report.charts.svg_chart import Line
from dpo_dist.safe_stream import printable

_INK, _QUIET, _GRID = "#1f2933", "#5b6470", "#e3e6ea"
_COLUMNS = 4
_DOTS_PER_INCH = 100
# Inches; a panel has room for its title and the rows of its legend above the axes.
_WIDTH, _CHART, _TITLE, _LEGEND_ROW, _BELOW = 16.0, 2.1, 0.32, 0.18, 0.62
_HEAD, _FOOT, _LEFT, _RIGHT, _BETWEEN = 0.5, 0.25, 0.6, 0.25, 0.7
_MOST_IN_ONE_COLUMN = 2
_MOST_POINTS = 1000
_FEW_POINTS = 30
_MANY_EVALUATIONS = 30
_SMALL = 8.5
_NOTE = (
    "faint: logged values    strong: moving mean    rings: evaluations    triangles: spikes    "
    "numbers: last values"
)


def draw_curves(rows: Rows, path: Path, title: str) -> None:
    """Draw metrics rows to the PNG file `path`, 1600 pixels wide.

    Args:
        rows: as in `log_history.json`. Panels without any value are omitted.
        path: written whole or not at all.
        title: one line above the panels.
    """
    curves = Curves(rows)
    panels = [(panel, lines) for panel in map(curves.labelled, PANELS) if (lines := curves.lines(panel))]
    columns = max(1, min(_COLUMNS, math.ceil(math.sqrt(len(panels)))))
    rows_of_panels = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    above = [max(_room_above(lines) for _, lines in row) for row in rows_of_panels]
    height = _HEAD + sum(above) + len(above) * (_CHART + _BELOW) + _FOOT
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    top = 1 - 0.14 / height
    figure.text(
        0.01, top, printable(title), va="top", fontsize=16, fontweight="bold", color=_INK, parse_math=False
    )
    figure.text(0.01, 0.1 / height, _NOTE if panels else "no metrics yet", fontsize=10, color=_QUIET)
    width = (_WIDTH - _LEFT - _RIGHT - (columns - 1) * _BETWEEN) / columns
    bottom = height - _HEAD
    for row, room in zip(rows_of_panels, above, strict=True):
        bottom -= room + _CHART
        for column, (panel, lines) in enumerate(row):
            left = _LEFT + column * (width + _BETWEEN)
            axes = figure.add_axes((left / _WIDTH, bottom / height, width / _WIDTH, _CHART / height))
            _draw(axes, panel, lines, np.asarray(curves.steps, dtype=np.float64))
        bottom -= _BELOW
    with atomic.staged_file(path) as temporary:
        canvas.print_figure(temporary, format="png")


def _labels(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.label for line in lines))


def _legend_columns(labels: Sequence[str]) -> int:
    return 1 if len(labels) <= _MOST_IN_ONE_COLUMN else 2


def _room_above(lines: Sequence[Line]) -> float:
    """Return the inches above the axes for the title and the legend."""
    labels = _labels(lines)
    return _TITLE + _LEGEND_ROW * math.ceil(len(labels) / _legend_columns(labels))


def _draw(axes: Axes, panel: Panel, lines: Sequence[Line], steps: FloatArray) -> None:
    labels = _labels(lines)
    smoothed = {line.label for line in lines if line.role == "smooth"}
    drawn: list[float] = []
    gaps = 0
    for line in lines:
        at, values = _points(line, steps)
        shown = np.isfinite(values) & ((values > 0) | (not panel.is_log))
        drawn += values[shown].tolist()
        gaps += int((~shown).sum()) * (line.role != "smooth")
        color = LIGHT_COLORS[labels.index(line.label) % len(LIGHT_COLORS)]
        is_faint = line.role == "raw" and line.label in smoothed
        _draw_line(axes, line, at, np.where(shown, values, np.nan), color, is_faint=is_faint)
    _place_axes(axes, value_axis(drawn, 0.0, 1.0, is_log=panel.is_log), steps)
    _add_texts(axes, panel, lines, gaps)


def _points(line: Line, steps: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return steps and values of the points of a line, thinned; both float64 [n]."""
    is_point = np.array([value is not None for value in line.values], dtype=np.bool_)
    values = np.array([value for value in line.values if value is not None], dtype=np.float64)
    kept = kept_points([values], _MOST_POINTS)
    return steps[is_point][kept], values[kept]


def _draw_line(
    axes: Axes, line: Line, steps: FloatArray, values: FloatArray, color: str, *, is_faint: bool
) -> None:
    if line.role == "spike":
        axes.plot(steps, values, color=color, linestyle="", marker="v", markersize=7, zorder=5)
        return
    if line.role == "evaluation":
        axes.plot(
            steps,
            values,
            color=color,
            linewidth=0.9,
            linestyle=(0, (3, 3)),
            marker="o",
            markersize=5.5 if len(steps) <= _MANY_EVALUATIONS else 3.5,
            markerfacecolor="white",
            markeredgewidth=1.4,
            zorder=4,
        )
        return
    axes.plot(
        steps,
        values,
        color=color,
        alpha=0.35 if is_faint else 1.0,
        linewidth=0.9 if is_faint else 2.0,
        marker="o" if len(steps) <= _FEW_POINTS else "",
        markersize=4,
        zorder=2 if is_faint else 3,
    )


def _place_axes(axes: Axes, values: Axis, steps: FloatArray) -> None:
    axes.set_yscale("log" if values.is_log else "linear")
    ticks = values.ticks(5)
    axes.set_yticks(ticks, tick_texts(ticks, is_log=values.is_log))
    axes.minorticks_off()
    axes.set_ylim(values.low, values.high)
    margin = 0.02 * (steps[-1] - steps[0]) or 1.0
    over = Axis(float(steps[0] - margin), float(steps[-1] + margin), 0.0, 1.0)
    ticks = over.ticks(5, whole=True)
    axes.set_xticks(ticks, tick_texts(ticks))
    axes.set_xlim(over.low, over.high)
    axes.set_xlabel("step", fontsize=_SMALL, color=_QUIET, labelpad=1, loc="right")
    axes.tick_params(labelsize=_SMALL, colors=_QUIET, length=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")


def _add_texts(axes: Axes, panel: Panel, lines: Sequence[Line], gaps: int) -> None:
    labels = _labels(lines)
    unit = f"  ({panel.unit})" if panel.unit else ""
    axes.set_title(
        f"{panel.title}{unit}",
        loc="left",
        fontsize=11,
        fontweight="bold",
        color=_INK,
        pad=72 * (_room_above(lines) - _TITLE) + 7,
    )
    legend = axes.legend(
        [Line2D([], [], color=color, linewidth=2.5) for color, _ in zip(LIGHT_COLORS, labels, strict=False)],
        [f"{printable(label)}  {_last_values(lines, label)}" for label in labels],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=_legend_columns(labels),
        fontsize=_SMALL,
        frameon=False,
        borderaxespad=0.3,
        borderpad=0,
        labelspacing=0.25,
        handlelength=1.3,
        columnspacing=1.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    if gaps:
        note = f"{gaps:,} missing or not finite"
        place = (0.99, 0.97)
        axes.annotate(
            note, place, xycoords="axes fraction", ha="right", va="top", fontsize=_SMALL, color=_QUIET
        )


def _last_values(lines: Sequence[Line], label: str) -> str:
    """Return the last values of a label: of its moving mean or values, and of its evaluations.

    Of many labels only one, for the room: that of evaluations.
    """
    own = {line.role: line for line in lines if line.label == label}
    found = {"": own.get("smooth", own.get("raw", own.get("spike"))), "evaluation ": own.get("evaluation")}
    texts = []
    for name, line in found.items():
        if line is not None:
            last = [value for value in line.values if value is not None][-1]
            texts.append(name + (number(last) if math.isfinite(last) else "no value"))
    return (
        "   ".join(texts) if _legend_columns(_labels(lines)) == 1 else texts[-1].removeprefix("evaluation ")
    )
