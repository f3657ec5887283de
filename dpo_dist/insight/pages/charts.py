"""The charts of a run: panels of metrics for its page, and as images."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from dpo_dist.foundation import files
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import number
from dpo_dist.insight.pages.svg import (
    AXIS_SWITCH,
    LIGHT_COLORS,
    Axis,
    FloatArray,
    Line,
    Role,
    chart,
    kept_points,
    smoothed,
    tick_texts,
    value_axis,
)
from dpo_dist.objective.metrics import BUCKETS

Rows = Sequence[Mapping[str, float]]

MOST_LABELS = len(LIGHT_COLORS)
"""Curves of a panel; a panel by source with more sources has the first ones, and its title says so."""

_SECONDS = 3600
_EVALUATION = "eval_"


@dataclass(frozen=True)
class Panel:
    """A chart of one or more metrics.

    Attributes:
        title: above the chart.
        curves: label and key of each metric; an evaluation has `eval_` before the key.
        unit: of the values.
        is_log: whether the axis is logarithmic.
        prefix: start of further keys; the rest of such a key is its label.
        is_smoothed: whether training values have a moving mean.
        size: of the unit in that of the metric.
    """

    title: str
    curves: tuple[tuple[str, str], ...] = ()
    unit: str = ""
    is_log: bool = False
    prefix: str = ""
    is_smoothed: bool = True
    size: float = 1.0


def _sides(key: str) -> tuple[tuple[str, str], ...]:
    return tuple((side, key.format(side)) for side in ("chosen", "rejected"))


PANELS = (
    Panel("Loss", (("loss", "loss"),)),
    Panel("Accuracy: chosen above rejected", (("accuracy", "rewards/accuracies"),)),
    Panel("Margin of rewards", (("margin", "rewards/margins"),)),
    Panel("Rewards", _sides("rewards/{}")),
    Panel("Both responses fall", (("share of pairs", "rewards/both_fall"),)),
    Panel("Log-prob per token", _sides("logps/{}_per_token"), "nats"),
    Panel("Log-prob of a response", _sides("logps/{}"), "nats"),
    Panel("Distance from the reference", _sides("kl/{}"), "nats/token"),
    Panel("Entropy", _sides("entropy/{}"), "nats/token"),
    Panel("Accuracy by source", prefix="rewards/accuracies/"),
    Panel("Accuracy by length", prefix="rewards/accuracies_by_length/", unit="tokens"),
    Panel("Length of generated responses", (("length", "samples/length"),), "tokens"),
    Panel("Generated responses that end", (("share", "samples/finished"),)),
    Panel("Gradient norm", (("norm before clipping", "grad_norm"),), is_log=True),
    Panel("Learning rate", (("learning rate", "learning_rate"),), is_smoothed=False),
    Panel("Throughput", (("tokens per second", "tokens_per_second"),)),
    Panel(
        "Peak memory of the first GPU",
        (("tensors", "memory/peak_allocated_bytes"),),
        "GiB",
        is_smoothed=False,
        size=2**30,
    ),
    Panel(
        "Model FLOPs utilization", (("of the measured peak", "mfu"), ("of the datasheet", "mfu/datasheet"))
    ),
)
"""All charts of a run, in their order."""


class Curves:
    """Metrics rows by step.

    Attributes:
        steps: all steps with a row, increasing.
        hours: hours of training steps up to each of them, without evaluations and starts; None if the rows do
            not have the seconds of a step.
    """

    def __init__(self, rows: Rows):
        merged: dict[float, dict[str, float]] = {}
        for row in sorted(rows, key=lambda row: row["step"]):
            merged.setdefault(row["step"], {}).update(row)
        self.steps = list(merged)
        self._rows = list(merged.values())
        self._keys = set().union(*self._rows)
        self.hours = self._hours()

    def labelled(self, panel: Panel) -> Panel:
        """Return the panel with the keys of its prefix as curves, at most `MOST_LABELS`."""
        if not panel.prefix:
            return panel
        found = {
            key.removeprefix(start)
            for key in self._keys
            for start in (panel.prefix, _EVALUATION + panel.prefix)
            if key.startswith(start)
        }
        labels = sorted(found, key=_natural)
        shown = labels[:MOST_LABELS]
        title = panel.title if len(shown) == len(labels) else f"{panel.title} ({len(shown)} of {len(labels)})"
        return replace(panel, title=title, curves=tuple((label, panel.prefix + label) for label in shown))

    def lines(self, panel: Panel, name: str = "") -> list[Line]:
        """Return the lines of a panel whose prefix is resolved.

        Each metric has its values at training steps, their moving mean and its values in evaluations. A panel
        with a prefix has means instead of values, because their many lines would hide each other.

        Args:
            panel: of `labelled`.
            name: of the run, which is the label instead of the metric's own.
        """
        lines = [line for label, key in panel.curves for line in self._lines(panel, name or label, key)]
        return lines if name else [*lines, *self._spikes(panel)]

    def _spikes(self, panel: Panel) -> Iterator[Line]:
        """Yield the marks of the rows that count one more spike of the loss, on the chart of the loss."""
        if ("loss", "loss") not in panel.curves or "loss_spikes" not in self._keys:
            return
        counts = itertools.accumulate((row.get("loss_spikes", 0.0) for row in self._rows), max, initial=0.0)
        marked = [
            row.get("loss") if row.get("loss_spikes", 0.0) > before else None
            for row, before in zip(self._rows, counts, strict=False)
        ]
        if any(value is not None for value in marked):
            yield Line("spike", marked, "spike", self.hours)

    def over(self, steps: Sequence[float], panel: Panel, name: str) -> list[Line]:
        """Return the `lines` of a panel with values for each of `steps`, among which are all own ones."""
        places = {step: place for place, step in enumerate(self.steps)}
        own = [places.get(step) for step in steps]
        hours = None if self.hours is None else [math.nan if at is None else self.hours[at] for at in own]
        return [
            Line(line.label, [None if at is None else line.values[at] for at in own], line.role, hours)
            for line in self.lines(panel, name)
        ]

    def _lines(self, panel: Panel, label: str, key: str) -> Iterator[Line]:
        values = self._values(panel, "loss", key, absent=math.nan)
        mean = _mean(values) if panel.is_smoothed else []
        found: tuple[tuple[list[float | None], Role], ...] = (
            ([] if panel.prefix and mean else values, "raw"),
            (mean, "smooth"),
            (self._values(panel, f"{_EVALUATION}loss", _EVALUATION + key, absent=None), "evaluation"),
        )
        for points, role in found:
            if any(value is not None for value in points):
                yield Line(label, points, role, self.hours)

    def _values(self, panel: Panel, mark: str, key: str, absent: float | None) -> list[float | None]:
        """Return a value for each step: None without a row that has `mark`, `absent` if it lacks `key`."""
        if key not in self._keys:
            return []
        values = [row.get(key, absent) if mark in row else None for row in self._rows]
        return values if panel.size == 1 else [None if each is None else each / panel.size for each in values]

    def _hours(self) -> list[float] | None:
        """Return the sums of the seconds of the steps; None if no row has them."""
        if not any("step_seconds" in row for row in self._rows):
            return None
        return [seconds / _SECONDS for seconds in itertools.accumulate(seconds_of_steps(self._rows))]


def seconds_of_steps(rows: Rows) -> list[float]:
    """Return the seconds of the optimizer steps of each row; 0 for a row without them."""
    seconds, before = [], 0.0
    for row in rows:
        seconds.append(row["step_seconds"] * (row["step"] - before) if "step_seconds" in row else 0.0)
        before = row["step"] if "step_seconds" in row else before
    return seconds


def charts(rows: Rows) -> str:
    """Return all charts of a run with the switch of their horizontal axis, as HTML; empty without a value."""
    curves = Curves(rows)
    panels = map(curves.labelled, PANELS)
    figures = [
        chart(panel.title, curves.lines(panel), curves.steps, curves.hours, panel.unit, log=panel.is_log)
        for panel in panels
    ]
    return chart_grid(figures)


def comparison_charts(runs: Mapping[str, Rows]) -> str:
    """Return the charts of several runs, a colour each, as HTML; a chart has one metric.

    Args:
        runs: metrics rows by the name of the run.
    """
    found = {name: Curves(rows) for name, rows in runs.items()}
    steps = sorted({step for curves in found.values() for step in curves.steps})
    figures = []
    for panel in PANELS:
        labelled = [curves.labelled(panel).curves for curves in found.values()]
        for label, key in dict.fromkeys(itertools.chain(*labelled)):
            single = replace(panel, curves=((label, key),), prefix="")
            lines = [line for name, curves in found.items() for line in curves.over(steps, single, name)]
            title = panel.title if len(panel.curves) == 1 else f"{panel.title}: {label}"
            figures.append(chart(title, lines, steps, None, panel.unit, log=panel.is_log))
    return chart_grid(figures)


def chart_grid(figures: Sequence[str]) -> str:
    """Return charts side by side, with the switch of their horizontal axis; empty without a chart."""
    return f'{AXIS_SWITCH}<div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def _mean(values: Sequence[float | None]) -> list[float | None]:
    """Return the moving mean; empty if it equals the values because they are few."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    mean = smoothed(known)
    if np.array_equal(mean, known, equal_nan=True):
        return []
    means = iter(mean.tolist())
    return [None if value is None else next(means) for value in values]


def _natural(label: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers in labels by value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", label)]


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
    with files.staged_file(path) as temporary:
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


Results = Mapping[str, Mapping[str, Any]]

_BLUE = "#2f6db3"
_ORANGE = "#e07b00"
_QUIET_INK = "#6b7280"
_MOST_LABELS = 24
_ACCURACY = "eval_rewards/accuracies"
_MARGIN = "eval_rewards/margins"
_PANELS = ((_ACCURACY, "accuracy", 0.5), (_MARGIN, "reward margin", 0.0))
_OF_ONE_RESPONSE = (("eval_logps/chosen_per_token", "log-prob of a token, nats", None),)


def draw_evaluation(results: Results, path: Path, title: str) -> None:
    """Draw the results of an evaluation to the PNG file `path`.

    Args:
        results: of `evaluation.results`. A loss of one response has log-probs in place of accuracy, margin
            and calibration.
        path: written whole or not at all.
        title: one line above the panels.
    """
    whole = next(iter(results.values()))
    panels = _PANELS if _ACCURACY in whole else _OF_ONE_RESPONSE
    bins = whole.get("calibration", {}).get("bins", [])
    rows = [(printable(name), row, "") for name, row in list(results.items())[: _MOST_LABELS + 1]]
    rows += [(f"{bucket} tokens", whole, f"_by_length/{bucket}") for bucket in BUCKETS]
    rows = [each for each in rows if panels[0][0] + each[2] in each[1]]
    height = max(4.5, 1.6 + 0.34 * len(rows))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(15 if bins else 10, height), dpi=100, layout=layout)
    canvas = FigureCanvasAgg(figure)
    hidden = len(results) - 1 - _MOST_LABELS
    note = f"; {hidden} more labels are in evaluation.json" if hidden > 0 else ""
    figure.suptitle(
        f"{printable(title)}: {whole['eval_pairs']:,} pairs, 95 % intervals{note}", parse_math=False
    )
    columns = len(panels) + bool(bins)
    for position, (key, label, chance) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, columns, position)
        _draw_intervals(axes, rows, key, label, chance, names=position == 1)
    if bins:
        error = whole["calibration"]["expected_calibration_error"]
        _draw_calibration(figure.add_subplot(1, columns, columns), bins, error)
    with files.staged_file(path) as temporary:
        canvas.print_png(str(temporary))


def _draw_intervals(
    axes: Axes,
    rows: Sequence[tuple[str, Mapping[str, Any], str]],
    key: str,
    label: str,
    chance: float | None,
    *,
    names: bool,
) -> None:
    """Draw a point with its interval for each row, the first one on top."""
    if chance is not None:
        axes.axvline(chance, color=_QUIET_INK, linewidth=1, linestyle=":")
    for position, (_, row, suffix) in enumerate(rows):
        value, ends = row[key + suffix], row["intervals"].get(key + suffix)
        color = _ORANGE if suffix else _BLUE
        if ends is not None:
            axes.plot(ends, (position, position), color=color, linewidth=2.5, alpha=0.5)
        axes.plot((value,), (position,), "o", color=color)
        axes.annotate(f"{value:.3f}", (value, position), (0, 6), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows] if names else [""] * len(rows))
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_calibration(axes: Axes, bins: Sequence[Mapping[str, Any]], error: float) -> None:
    """Draw the accuracy of each bin of confidence, with an area in proportion to its pairs."""
    axes.plot((0.5, 1), (0.5, 1), color=_QUIET_INK, linewidth=1, linestyle=":")
    most = max(one["pairs"] for one in bins)
    areas = [20 + 280 * one["pairs"] / most for one in bins]
    x, y = ([one[name] for one in bins] for name in ("confidence", "accuracy"))
    axes.plot(x, y, color=_BLUE, linewidth=1)
    axes.scatter(x, y, areas, color=_BLUE, alpha=0.6)
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.48, *y) - 0.02, 1.02)
    axes.set_xlabel("confidence, sigmoid(abs(margin))")
    axes.set_ylabel("accuracy")
    axes.set_title(f"calibration error {error:.3f}; areas: pairs", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
