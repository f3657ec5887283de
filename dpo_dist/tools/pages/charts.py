"""Charts that need no script: curves of runs (on pages and as an image), a scatter plot, a histogram.

Matplotlib draws the image only: its SVG takes six times as long, and needs styles that pages forbid.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from dpo_dist.foundation import files
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import number
from dpo_dist.kit import ACCURACIES, AUC, CUSTOM, METRICS, PREFIX, TERMS, find_metric
from dpo_dist.tools.pages.render import part

Rows = Sequence[Mapping[str, float]]
FloatArray = NDArray[np.float64]
Interval = Sequence[float] | None

COLORS = ("#0072b2", "#c85200", "#00805c", "#a3478c", "#8f6a00", "#5b6470")
"""Colours of lines on white that colour-blind people can distinguish: after Okabe and Ito
(https://jfly.uni-koeln.de/color/), darkened to a contrast of 4 to white. page.css has them too."""

_PADDING = 0.05
_MOST_TICKS = 5
_SHORT = 200.0  # a logarithmic axis whose ends have a smaller ratio has ticks within a decade
_SMOOTHED_SHARE = 0.06
_MOST_POINTS = 400
_FEW_POINTS = 30
_LARGEST = 1e100  # the ends of an axis and a sum of values must stay finite
PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)
"""Those that a distribution has."""
_WIDEST_BAR = 24.0  # else a few different values look like a solid box


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis that draws `low` at the coordinate `start` and `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, *, is_log: bool = False) -> "Axis":
        """Return an axis for these finite values, with some room at both ends."""
        values = list(values)
        if not values:
            values = [1.0, 10.0] if is_log else [0.0, 1.0]
        low = min(values)
        high = max(values)
        if is_log:
            room = (high / low) ** _PADDING if high > low else 2.0
            return cls(low / room, high * room, start, end, is_log=True)
        room = _PADDING * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        """Return the coordinate of a value, in tenths; a logarithmic axis needs a positive value."""
        low = self.low
        high = self.high
        if self.is_log:
            low, high, value = map(math.log10, (low, high, value))
        share = (value - low) / ((high - low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Return about five round values within the axis; `whole`: integers only."""
        from matplotlib.ticker import Locator, LogLocator, MaxNLocator  # noqa: PLC0415  (slow; only rank 0 draws)

        locator: Locator = MaxNLocator(_MOST_TICKS, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
        if self.is_log:
            subs = (1.0, 2.0, 5.0) if self.high < _SHORT * self.low else (1.0,)
            locator = LogLocator(subs=subs, numticks=_MOST_TICKS + 1)
        slack = 1e-9 * (self.high - self.low)
        candidates = map(float, locator.tick_values(self.low, self.high))
        within = [tick for tick in candidates if self.low - slack <= tick <= self.high + slack]
        if self.is_log and len(within) < 2:  # too small a range for logarithmic ticks
            return Axis(self.low, self.high, self.start, self.end).ticks()
        return within

    def marks(self, *, whole: bool = False) -> list[tuple[float, str]]:
        """Return each tick's coordinate and text."""
        return [(self.place(tick), number(tick)) for tick in self.ticks(whole=whole)]


_Role = Literal["raw", "smooth", "evaluation", "spike", "noise"]


class Line:
    """One line of a chart, with increasing steps; lines with the same label share their colour.

    A value that is not finite or too large to draw, or not positive on a logarithmic axis, becomes a gap
    (nan). A "raw" line is drawn lighter if there is a "smooth" one; a "spike" is a mark without a line.
    """

    def __init__(
        self, label: str, role: _Role, steps: ArrayLike, values: ArrayLike, *, log: bool = False
    ) -> None:
        self.label = label
        self.role = role
        self.steps = np.array(steps, dtype=np.float64)
        self.values = np.array(values, dtype=np.float64)
        self.values[~(np.abs(self.values) < _LARGEST) | ((self.values <= 0) & log)] = math.nan

    def smoothed(self) -> "Line":
        """Return the line after two passes of a centred mean over 6 % of the values; gaps stay gaps."""
        is_known = np.isfinite(self.values)
        half = int(_SMOOTHED_SHARE * is_known.sum() / 2)
        if half == 0:
            return self

        def window(values: FloatArray) -> FloatArray:
            sums = np.cumsum(np.pad(values, (half + 1, half)))  # a convolution is quadratic in long runs
            return np.asarray(sums[2 * half + 1 :] - sums[: -2 * half - 1])

        means = np.where(is_known, self.values, 0.0)
        counts = np.maximum(1.0, window(is_known.astype(np.float64)))
        for _ in range(2):
            means = np.where(is_known, window(means) / counts, 0.0)
        return Line(self.label, "smooth", self.steps, np.where(is_known, means, math.nan))

    def extremes(self, most: int) -> FloatArray:
        """Return about `most` steps at most that keep the line's shape.

        They are both ends, and in each of equal parts the steps of the smallest and the largest value.
        """
        if len(self.steps) <= most:
            return self.steps
        extremes = {0, len(self.steps) - 1}
        for indices in np.array_split(np.arange(len(self.steps)), max(1, most // 2)):
            values = self.values[indices]
            if np.isfinite(values).any():
                extremes.add(int(indices[np.nanargmin(values)]))
                extremes.add(int(indices[np.nanargmax(values)]))
        return self.steps[sorted(extremes)]


def chart(
    title: str,
    lines: Sequence[Line],
    unit: str = "",
    *,
    log: bool = False,
    over: str = "step",
    names: Sequence[str] = (),
) -> Markup:
    """Return a `<figure>` with one chart; empty if no line has a point. `over`: title of the horizontal axis.

    A long line is drawn with about 400 points, with its smallest and largest values among them. `names`: the
    labels of a legend that several charts share; the items below the chart then have no labels.
    """
    lines = [line for line in lines if line.steps.size]
    if not lines:
        return Markup("")
    with_raw = {line.label for line in lines if line.role == "raw"}
    shapes = [line for line in lines if line.role != "smooth" or line.label not in with_raw]
    steps = np.unique(np.concatenate([line.extremes(_MOST_POINTS // len(shapes)) for line in shapes]))
    drawing = []
    for line in lines:
        is_point = np.isin(line.steps, steps)
        drawing.append(Line(line.label, line.role, line.steps[is_point], line.values[is_point]))
    low = float(steps[0])
    high = float(steps[-1])
    if high == low:
        high += 1
    across = Axis(low, high, 50, 364)
    up = _value_axis(drawing, 184, 8, is_log=log)
    labels = names or list(dict.fromkeys(line.label for line in drawing))
    points = []
    paths = []
    for line in drawing:
        values = [None if math.isnan(value) else float(f"{value:.6g}") for value in line.values]
        points.append([line.steps.tolist(), values])
        paths += _paths(line, drawing, labels, across, up)
    data = {
        "over": over,
        "shared": bool(names),
        "box": [across.start, across.end, up.end, up.start],
        "xAxis": [across.low, across.high],
        "yAxis": [up.low, up.high, up.is_log],
        "lines": points,
    }
    figure = {
        "title": title,
        "unit": unit,
        "over": over,
        "across": across,
        "up": up,
        "place": number(high),
        "json": json.dumps(data, separators=(",", ":")),
        "paths": paths,
        "legend": _legend(drawing, labels, high, over, is_shared=bool(names)),
        "is_shared": bool(names),
    }
    return part("svg.jinja", "chart", figure)


def _value_axis(lines: Sequence[Line], start: float, end: float, *, is_log: bool) -> Axis:
    values = chain.from_iterable(line.values.tolist() for line in lines)
    return Axis.around(filter(math.isfinite, values), start, end, is_log=is_log)


def _paths(
    line: Line, lines: Sequence[Line], labels: Sequence[str], across: Axis, up: Axis
) -> list[tuple[str, str]]:
    """Return CSS classes and path data of a line, which gaps interrupt."""
    dots = ""
    path = ""
    is_after_gap = True
    for step, value in zip(line.steps.tolist(), line.values.tolist(), strict=True):
        if math.isnan(value):
            is_after_gap = True
            continue
        point = f"{across.place(step):g} {up.place(value):g}"
        dots += f"M{point}h0"
        path += f"M{point}h0" if is_after_gap else f"L{point}"
        is_after_gap = False
    color = color_classes(labels, line.label)
    if line.role == "spike":
        return [(f"spike {color}", dots)]
    style = f"{line.role} {color}"
    if line.role == "raw" and (line.label, "smooth") in {(each.label, each.role) for each in lines}:
        style = f"raw light {color}"
    if line.role == "evaluation":
        return [(style, path), (f"mark {color}", dots), ("hole", dots)]
    if line.role == "noise" or len(line.steps) > _FEW_POINTS:
        return [(style, path)]
    return [(style, path), (f"dot {style}", dots)]


def color_classes(labels: Sequence[str], label: str) -> str:
    """Return the CSS classes of a label's colour; after six labels the colours repeat with dashed lines."""
    repeats, color = divmod(labels.index(label), len(COLORS))
    return f"c{color} again" if repeats % 2 else f"c{color}"


def _legend(
    lines: Sequence[Line], labels: Sequence[str], end: float, over: str, *, is_shared: bool
) -> list[Mapping[str, Any]]:
    """Return an item for each label's curve and one for its evaluations, with the last values.

    Under a shared legend, a label with evaluations has the item of its evaluations only.
    """
    indices_of_items: dict[tuple[str, bool], list[int]] = {}
    for index, line in enumerate(lines):
        indices_of_items.setdefault((line.label, line.role == "evaluation"), []).append(index)
    joint = " \u00b7 " if is_shared else " \u00b7 mean "
    items = list[Mapping[str, Any]]()
    for (label, is_evaluation), indices in indices_of_items.items():
        if is_shared and not is_evaluation and (label, True) in indices_of_items:
            continue
        mark = "ring" if is_evaluation else "stroke"
        has_both = is_evaluation and (label, False) in indices_of_items
        item = {
            "color": color_classes(labels, label),
            "lines": indices,
            "mark": mark,
            "label": label,
            "note": " (evaluation)" if has_both else "",
            "last": joint.join(_last_value(lines[index], end, over) for index in indices),
        }
        items.append(item)
    return items


def _last_value(line: Line, end: float, over: str) -> str:
    step = float(line.steps[-1])
    value = float(line.values[-1])
    text = "no value" if math.isnan(value) else number(value)
    return text if step == end else f"{text} at {over} {number(step)}"


@dataclass(frozen=True)
class Panel:
    """A chart of the metrics whose `chart` in METRICS is `title`, or of the custom metric with that name.

    `in_image`: training_curves.png has it too.
    """

    title: str
    in_image: bool = False
    is_log: bool = False
    is_smoothed: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the panel's metrics."""
        metrics = tuple(name for name, metric in METRICS.items() if metric.chart == self.title)
        return metrics or (self.title,)

    def label(self, key: str) -> str:
        """Return the label of a metric's lines."""
        if len(self.keys) == 1:
            return find_metric(key).title
        return key.rsplit("/", 1)[-1].removesuffix("_per_token")


_ACCURACY, _AUC = (METRICS[name].chart for name in ACCURACIES)
PANELS = (
    Panel("Loss", in_image=True),
    *(Panel(METRICS[name].chart) for name in TERMS.values()),
    Panel("Loss above that of soft labels"),
    Panel(_ACCURACY, in_image=True),
    Panel(_AUC, in_image=True),
    Panel("Margin of rewards", in_image=True),
    Panel("Rewards", in_image=True),
    Panel("Log-ratio of mismatched responses"),
    Panel("Agreement with the teacher"),
    Panel("Log-prob per token"),
    Panel("Distance from the reference"),
    Panel("Length of generated responses"),
    Panel("Generated responses that end"),
    Panel("Gradient norm", in_image=True, is_log=True),
    Panel("Learning rate", in_image=True, is_smoothed=False),
)


def charts(rows: Rows, noise: Mapping[str, float]) -> list[Markup]:
    """Return all charts of a run that have a value; `noise`: how far rounding alone moves each metric."""
    figures = []
    for panel in _panels(rows):
        lines = list(panel_lines(panel, rows, noise))
        figures.append(chart(panel.title, lines, find_metric(panel.keys[0]).unit, log=panel.is_log))
    return list(filter(None, figures))


@dataclass(frozen=True)
class Curves:
    """The rows of a run, in which `step` counts pairs; runs with the same label share a colour."""

    label: str
    kind: str  # of its loss
    rows: Rows


def charts_of_runs(runs: Sequence[Curves], over: str, apart: tuple[str, ...]) -> list[Markup]:
    """Return a chart over pairs for each metric, with the moving mean and the evaluations of each run.

    Metrics whose names start with one of `apart` have a chart for each kind of loss.
    """
    figures = []
    names = list(dict.fromkeys(run.label for run in runs))
    for panel in _panels(list(chain(*(run.rows for run in runs)))):
        for key in panel.keys:
            title = panel.title if len(panel.keys) == 1 else f"{panel.title}: {panel.label(key)}"
            lines_of_charts: dict[str, list[Line]] = {}
            for run in runs:
                chart_title = f"{title}, {run.kind}" if key.startswith(apart) else title
                lines = lines_of_charts.setdefault(chart_title, [])
                for line in _metric_lines(panel, key, run.label, run.rows):
                    if line.role == "smooth":
                        lines.pop()  # the raw line before it, in whose place it is drawn
                    lines.append(line)
                for line in lines:
                    if line.role == "raw":
                        line.role = "smooth"
            for name, lines in lines_of_charts.items():
                unit = find_metric(key).unit
                figures.append(chart(name, lines, unit, log=panel.is_log, over=over, names=names))
    return list(filter(None, figures))


def _panels(rows: Rows) -> list[Panel]:
    names = dict.fromkeys(key.removeprefix(PREFIX) for key in chain(*rows))
    custom = [Panel(name) for name in names if name.startswith(CUSTOM) and name.count("/") == 1]
    return [*PANELS, *custom]


def panel_lines(panel: Panel, rows: Rows, noise: Mapping[str, float]) -> Iterator[Line]:
    """Yield a panel's lines: each metric's values, their moving mean, and the values of evaluations.

    The last line is the noise level of the first metric, if it is known.
    """
    steps = [row for row in rows if "loss" in row]
    for key in panel.keys:
        yield from _metric_lines(panel, key, panel.label(key), rows)
    if panel.keys == ("loss",):
        spikes = []
        most = 0.0
        for row in steps:
            count = row.get("loss_spikes", 0.0)
            if count > most:
                spikes.append(row)
                most = count
        if spikes:
            yield _line(panel, "spike", "spike", spikes, "loss")
    level = noise.get(panel.keys[0])
    if level and any(panel.keys[0] in row for row in steps):
        yield Line("noise of rounding", "noise", [row["step"] for row in steps], [level] * len(steps))


def _metric_lines(panel: Panel, key: str, label: str, rows: Rows) -> Iterator[Line]:
    """Yield a metric's lines: values, their moving mean, and values of evaluations."""
    steps = [row for row in rows if "loss" in row]
    if any(key in row for row in steps):
        raw = _line(panel, label, "raw", steps, key)
        yield raw
        mean = raw.smoothed() if panel.is_smoothed else raw
        if mean is not raw:
            yield mean
    evaluations = [row for row in rows if PREFIX + key in row]
    if evaluations:
        yield _line(panel, label, "evaluation", evaluations, PREFIX + key)


def _line(panel: Panel, label: str, role: _Role, rows: Rows, key: str) -> Line:
    values = [row.get(key, math.nan) for row in rows]
    return Line(label, role, [row["step"] for row in rows], values, log=panel.is_log)


_STYLES: Mapping[_Role, Mapping[str, Any]] = {
    "raw": {"linewidth": 1.2, "alpha": 0.5},
    "smooth": {"linewidth": 2.0},
    "evaluation": {"linewidth": 0.9, "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "spike": {"linestyle": "", "marker": "v", "markersize": 7},
}


def draw_curves(rows: Rows, path: Path, title: str) -> None:
    """Draw metrics rows to the PNG file `path`, 1600 pixels wide, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (slow; only rank 0 draws)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(16, 8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(printable(title), parse_math=False)
    margins = {"left": 0.05, "right": 0.99, "bottom": 0.08, "top": 0.9, "hspace": 0.35, "wspace": 0.2}
    absent = _ACCURACY if any(AUC in row for row in rows) else _AUC
    panels = [panel for panel in PANELS if panel.in_image and panel.title != absent]
    for axes, panel in zip(figure.subplots(2, 3, gridspec_kw=margins).flat, panels, strict=True):
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True)
        axes.set_title(panel.title, loc="left", y=1.0)  # a search for free space takes a third of the time
        axes.grid(alpha=0.3)
        lines = list(panel_lines(panel, rows, {}))
        axis = _value_axis(lines, 0, 1, is_log=panel.is_log)
        axes.set(yscale="log" if panel.is_log else "linear", ylim=(axis.low, axis.high))
        axes.set_yticks(axis.ticks(), [text for _, text in axis.marks()])
        axes.minorticks_off()
        labels = list(dict.fromkeys(line.label for line in lines))
        for line in lines:
            name: str | None = line.label
            if line.role == "smooth":
                name = None
            elif line.role == "evaluation":
                name = f"{line.label} (evaluation)"
            color = COLORS[labels.index(line.label)]
            axes.plot(line.steps, line.values, color=color, label=name, **_STYLES[line.role])
        if lines:
            axes.legend(frameon=False)
    with files.staged_file(path) as temporary:
        canvas.print_figure(temporary, format="png")


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot with its intervals."""

    label: str
    x: float
    y: float
    x_ends: Interval
    y_ends: Interval


def scatter(points: Sequence[Point], x_title: str, y_title: str, level: tuple[float, str] | None) -> Markup:
    """Return a scatter plot of numbered points with intervals as bars, and a legend; empty without a point.

    The horizontal axis is logarithmic. `level`: value and name of a horizontal line.
    """
    if not points:
        return Markup("")
    x_values = []
    y_values = []
    for point in points:
        x_values += [point.x, *(point.x_ends or ())]
        y_values += [point.y, *(point.y_ends or ())]
    if level:
        y_values.append(level[0])
    across = Axis.around((x for x in x_values if x > 0), 58, 704, is_log=True)
    up = Axis.around(y_values, 304, 14)
    return part("svg.jinja", "scatter", points, across, up, x_title, y_title, level)


def distribution(
    values: NDArray[Any], edges: FloatArray, counts: NDArray[np.int64] | None = None
) -> dict[str, Any]:
    """Return the distribution of values; a value outside the edges counts in the first or last bin.

    `counts`: how often there is each value, once by default.
    """
    bins, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges, weights=counts)
    percentiles = np.percentile(values, PERCENTILES, weights=counts, method="inverted_cdf")
    return {
        "count": len(values) if counts is None else int(counts.sum()),
        "mean": float(np.average(values, weights=counts)),
        "smallest": float(np.min(values)),
        "largest": float(np.max(values)),
        "percentiles": dict(zip(PERCENTILES, percentiles.tolist(), strict=True)),
        "edges": edges.tolist(),
        "counts": bins.tolist(),
    }


def histogram(values: Mapping[str, Any], title: str, limit: float | None = None) -> Markup:
    """Return a histogram of a `distribution`; numbers from 0 on have a logarithmic axis.

    The smallest and the largest value get a label, and percentiles where there is room. A line marks `limit`.
    """
    width = 360
    bottom = 92
    room = 44
    edges = values["edges"]
    percentiles = values["percentiles"]
    shape: Callable[[float], float] = math.log1p if edges[0] >= 0 else float
    axis = Axis(shape(edges[0]), shape(edges[-1]), 0, width)
    largest = max(values["counts"]) or 1
    bars = []
    for (low, high), count in zip(pairwise(edges), values["counts"], strict=True):
        if count:
            x = axis.place(shape(low))
            height = round(max(1.0, count / largest * bottom), 1)
            bar_width = round(min(max(1.0, axis.place(shape(high)) - x - 0.5), _WIDEST_BAR), 1)
            label = f"{number(low, 3)} to {number(high, 3)}: {count:,}"
            bars.append((x, round(bottom - height, 1), bar_width, height, label))
    ticks: list[tuple[float, str, str]] = []
    for value in (values["smallest"], values["largest"], percentiles[50], percentiles[95], percentiles[25]):
        x = axis.place(shape(value))
        if any(abs(x - other) <= room for other, *_ in ticks):
            continue
        anchor = "middle"
        if x < room / 2:
            anchor = "start"
        elif x > width - room / 2:
            anchor = "end"
        ticks.append((x, number(value, 3), anchor))
    mark = None
    if limit is not None and edges[0] <= limit <= edges[-1]:
        mark = (axis.place(shape(limit)), number(limit, 3))
    plot = {
        "width": width,
        "height": bottom + 18,
        "bottom": bottom,
        "title": title,
        "bars": bars,
        "ticks": ticks,
        "limit": mark,
    }
    return part("svg.jinja", "histogram", plot)
