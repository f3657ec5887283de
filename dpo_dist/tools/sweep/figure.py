"""The figure of a sweep: metrics over the swept value, with the spread over seeds, as SVG and PNG."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import log10
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from dpo_dist.foundation.files import staged_file, write_text
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import number
from dpo_dist.kit import LOSS_METRICS, MAIN, PREFIX, find_metric
from dpo_dist.tools.pages.charts import COLORS, Axis, color_classes
from dpo_dist.tools.pages.render import part

SEED = "trainer.seed"
_WIDE = 10.0  # two values with a larger ratio are on a logarithmic axis
_PANEL_WIDTH = 380
_PANEL_HEIGHT = 252
_LINE_HEIGHT = 16  # of the legend
_LEFT = 50.0
_RIGHT = 364.0
_TOP = 28.0
_BOTTOM = 204.0
_BARS = 0.7  # the part of the space of a value that its bars take
_APART = 5.0  # coordinates between the points of two lines at one value: else bars of the spread hide others


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over seeds at a swept value; `spread`: standard deviation, 0 of one seed."""

    value: Any
    mean: float
    spread: float
    seeds: int


@dataclass(frozen=True)
class Figure:
    """A metric over the values of the swept key `over`; a series for each combination of other settings."""

    metric: str
    over: str
    series: Mapping[str, Sequence[Mean]]

    @property
    def means(self) -> Iterator[Mean]:
        """The means of all series."""
        return chain.from_iterable(self.series.values())

    @property
    def values(self) -> list[Any]:
        """The swept values, numbers in order."""
        values = list(dict.fromkeys(mean.value for mean in self.means))
        return sorted(values) if self.has_numbers else values

    @property
    def has_numbers(self) -> bool:
        """Whether the swept values are numbers: else they have bars."""
        return all(_is_number(mean.value) for mean in self.means)

    @property
    def is_log(self) -> bool:
        """Whether the values are spread more evenly on a logarithmic axis."""
        return self.has_numbers and _is_log(self.values)

    @property
    def title(self) -> str:
        """The metric's title."""
        part_title = "evaluation " if self.metric.startswith(PREFIX) else ""
        return part_title + find_metric(self.metric.removeprefix(PREFIX)).title

    @property
    def ends(self) -> Iterator[float]:
        """The ends of all bars of the spread; of columns also 0."""
        for each in self.means:
            yield from (each.mean - each.spread, each.mean + each.spread)
        if not self.has_numbers:
            yield 0.0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_log(values: Sequence[float]) -> bool:
    if values[0] <= 0 or len(values) < 2:
        return False
    if len(values) == 2:
        return values[1] >= _WIDE * values[0]

    def evenness(places: Sequence[float]) -> float:
        steps = [high - low for low, high in pairwise(places)]
        return min(steps) / max(steps)

    return evenness(list(map(log10, values))) > evenness(values)


def figures(points: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return a figure for each main metric of the completed points; none without another key than the seed.

    Of the swept keys the one with most values is the horizontal axis, numbers first. Losses, rewards and
    margins have no figure if the losses of the points differ.
    """
    points = [point for point in points if point.get("metrics")]
    values = dict[str, dict[str, Any]]()
    for key in dict.fromkeys(chain.from_iterable(point["settings"] for point in points)):
        of_points = [point["settings"].get(key) for point in points]
        by_text = {_text(value): value for value in of_points}
        if key != SEED and len(by_text) > 1:
            values[key] = by_text
    if not values:
        return []

    def rank(key: str) -> tuple[bool, int]:
        return all(map(_is_number, values[key].values())), len(values[key])

    over = max(values, key=rank)
    others = [key for key in values if key != over]
    losses_differ = any(key.partition(".")[0] == "loss" for key in values)
    names = []
    for name in MAIN:
        if not (losses_differ and name.startswith(LOSS_METRICS)):
            names += [PREFIX + name, name]
    of_metrics = [Figure(name, over, _series(points, name, over, others)) for name in names]
    return [figure for figure in of_metrics if figure.series]


def _text(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _series(
    points: Sequence[Mapping[str, Any]], metric: str, over: str, others: Sequence[str]
) -> dict[str, list[Mean]]:
    """Return the means over seeds by the label of the other settings, in the order of the points."""
    by_label = dict[str, dict[str, tuple[Any, list[float]]]]()
    for point in points:
        settings = point["settings"]
        result = point["metrics"].get(metric)
        if result is None:
            continue
        label = ", ".join(f"{key.rpartition('.')[2]} {_text(settings.get(key))}" for key in others)
        value = settings.get(over)
        _, results = by_label.setdefault(label, {}).setdefault(_text(value), (value, []))
        results.append(result)
    series = dict[str, list[Mean]]()
    for label, by_value in by_label.items():
        means = []
        for value, results in by_value.values():
            spread = stdev(results) if len(results) > 1 else 0.0
            means.append(Mean(value, fmean(results), spread, len(results)))
        has_numbers = all(_is_number(each.value) for each in means)
        series[label] = sorted(means, key=lambda each: each.value) if has_numbers else means
    return series


def _drawing(figure: Figure) -> dict[str, Any]:
    """Return what the template draws of a figure, in tenths of its coordinates."""
    values = figure.values
    up = Axis.around(figure.ends, _BOTTOM, _TOP)
    if not figure.has_numbers:
        low = min(0.0, up.low) if min(figure.ends) < 0 else 0.0
        up = Axis(low, up.high, _BOTTOM, _TOP)
        places = {each: _LEFT + (_RIGHT - _LEFT) * (at + 0.5) / len(values) for at, each in enumerate(values)}
        marks = [(round(place, 1), _text(each)) for each, place in places.items()]
        width = _BARS * (_RIGHT - _LEFT) / len(values) / len(figure.series)
    else:
        across = Axis.around(values, _LEFT, _RIGHT, is_log=figure.is_log)
        places = {each: across.place(each) for each in values}
        # The swept values themselves are the ticks where there is room for their texts.
        distances = [places[high] - places[low] for low, high in pairwise(values)]
        has_room = min(distances, default=_RIGHT) > 34
        marks = [(places[each], _text(each)) for each in values] if has_room else across.marks()
        width = 0.0
    series = []
    for at, (label, means) in enumerate(figure.series.items()):
        shift = (at + 0.5 - len(figure.series) / 2) * (width or _APART)
        points = []
        for each in means:
            title = f"{figure.over} {_text(each.value)}"
            if label:
                title += f", {label}"
            text = f"{title}: {number(each.mean)}"
            if each.seeds > 1:
                text += f" ± {number(each.spread)}, {each.seeds} seeds"
            point = {
                "x": round(places[each.value] + shift, 1),
                "y": up.place(each.mean),
                "low": up.place(each.mean - each.spread),
                "high": up.place(each.mean + each.spread),
                "has_spread": each.seeds > 1,
                "text": text,
            }
            points.append(point)
        line = {
            "label": label,
            "color": color_classes(list(figure.series), label),
            "hex": COLORS[at % len(COLORS)],
            "points": points,
            "width": width,
        }
        series.append(line)
    lines_of_legend = len(series) if len(series) > 1 else 0
    return {
        "title": figure.title,
        "unit": find_metric(figure.metric.removeprefix(PREFIX)).unit,
        "over": figure.over,
        "up": up,
        "marks": marks,
        "series": series,
        "left": _LEFT,
        "right": _RIGHT,
        "bottom": _BOTTOM,
        "zero": up.place(max(up.low, 0.0)),
        "height": _PANEL_HEIGHT + _LINE_HEIGHT * lines_of_legend,
    }


def figure_charts(panels: Sequence[Figure]) -> list[Markup]:
    """Return a chart for each figure, for a page."""
    return [part("svg.jinja", "spread", [_drawing(figure)], _PANEL_WIDTH) for figure in panels]


def write_figure(panels: Sequence[Figure], svg: Path, png: Path) -> None:
    """Write the figures beside each other as SVG, and as PNG, each whole or not at all."""
    image = part("svg.jinja", "spread", list(map(_drawing, panels)), _PANEL_WIDTH)
    write_text(svg, str(image).strip() + "\n")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (slow)
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415
    from matplotlib.transforms import offset_copy  # noqa: PLC0415

    canvas = Canvas(figsize=(5 * len(panels), 4), dpi=200, layout="constrained")
    for axes, figure in zip(canvas.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        values = figure.values
        width = _BARS / len(figure.series)
        for at, (label, means) in enumerate(figure.series.items()):
            color = COLORS[at % len(COLORS)]
            spreads = [each.spread for each in means]
            heights = [each.mean for each in means]
            name = printable(label) or None
            if figure.has_numbers:
                line = "--" if at // len(COLORS) % 2 else "-"
                places = [each.value for each in means]
                shift = (at + 0.5 - len(figure.series) / 2) * _APART
                axes.errorbar(
                    places,
                    heights,
                    spreads,
                    label=name,
                    color=color,
                    marker="o",
                    linestyle=line,
                    capsize=3,
                    transform=offset_copy(axes.transData, canvas, x=shift, units="points"),
                )
            else:
                shift = (at + 0.5) * width - _BARS / 2
                places = [values.index(each.value) + shift for each in means]
                axes.bar(places, heights, width, yerr=spreads, color=color, label=name, capsize=3)
        if not figure.has_numbers:
            axes.set_xticks(range(len(values)), [printable(_text(each)) for each in values])
        else:  # lines that are moved aside do not set the ends of the axes
            across = Axis.around(values, 0, 1, is_log=figure.is_log)
            up = Axis.around(figure.ends, 0, 1)
            axes.set(xscale="log" if figure.is_log else "linear", xlim=(across.low, across.high))
            axes.set_ylim(up.low, up.high)
            axes.set_xticks(values, list(map(_text, values)))
            axes.minorticks_off()
        axes.set(xlabel=figure.over, ylabel=figure.title)
        axes.grid(alpha=0.3)
        if len(figure.series) > 1:
            axes.legend(frameon=False)
    with staged_file(png) as temporary:
        FigureCanvasAgg(canvas).print_figure(temporary, format="png")
