"""Charts of pages as SVG, complete without a script: curves over steps, a scatter, a histogram."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from dpo_dist.foundation.text import number
from dpo_dist.insight.pages.render import part

FloatArray = NDArray[np.float64]
Interval = Sequence[float] | None

COLORS = ("#0072b2", "#c85200", "#00805c", "#a3478c", "#8f6a00", "#5b6470")
"""Colours of lines on white that colour-blind people can distinguish: after Okabe and Ito
(https://jfly.uni-koeln.de/color/), darkened to a contrast of 4 to white. page.css has them too."""

_PADDING = 0.05
_MOST_DECADES = 6
_SHORT = 200.0  # a logarithmic axis has ticks within a decade below this ratio of its ends
_SMOOTHED_SHARE = 0.06
_MOST_POINTS = 400
_FEW_POINTS = 30
_WIDTH, _HEIGHT = 380, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 364, 8, 184
_FINE = 10  # paths have whole coordinates in tenths of a pixel


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis: `low` is drawn at the coordinate `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, *, is_log: bool = False) -> "Axis":
        """Return the axis of finite values, with some room at both ends."""
        found = list(values)
        low, high = (min(found), max(found)) if found else (1.0, 10.0) if is_log else (0.0, 1.0)
        if is_log:
            room = (high / low) ** _PADDING if high > low else 2.0
            return cls(low / room, high * room, start, end, is_log=True)
        room = _PADDING * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        """Return the coordinate of a value; of a logarithmic axis it must be positive."""
        low, high, at = (
            map(math.log10, (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        )
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, most: int = 5, *, whole: bool = False) -> list[float]:
        """Return at most about `most` round values within the axis; `whole`: integers only."""
        if self.is_log:
            subs = (1.0, 2.0, 5.0) if self.high < _SHORT * self.low else (1.0,)
            found = LogLocator(subs=subs, numticks=_MOST_DECADES).tick_values(self.low, self.high)
        else:
            locator = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
            found = locator.tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        within = [float(tick) for tick in found if self.low - slack <= tick <= self.high + slack]
        return within if len(within) > 1 or not self.is_log else [self.low, self.high]

    def marks(self, *, whole: bool = False) -> list[tuple[float, str]]:
        """Return coordinate and text of each tick."""
        ticks = self.ticks(whole=whole)
        return [(round(self.place(tick), 1), number(tick)) for tick in ticks]


def smoothed(values: FloatArray) -> FloatArray:
    """Return a moving mean, float64 [n]: two passes of a centred mean over 6 % of the values.

    Values that are not finite are in no mean and stay as they are.
    """
    is_finite = np.isfinite(values)
    half = int(_SMOOTHED_SHARE * int(is_finite.sum()) / 2)
    index = np.arange(len(values))
    first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))

    def window_sums(of: FloatArray) -> FloatArray:
        sums = np.concatenate([[0.0], np.cumsum(of)])
        return np.asarray(sums[end] - sums[first], dtype=np.float64)

    counts = np.maximum(window_sums(is_finite.astype(np.float64)), 1.0)
    means = np.where(is_finite, values, 0.0)
    for _ in range(2 if half else 0):
        means = np.where(is_finite, window_sums(means) / counts, 0.0)
    return np.where(is_finite, means, values)


def kept_points(lines: Sequence[FloatArray], most: int) -> NDArray[np.int64]:
    """Return increasing indices of at most about `most` points that show the shape of all lines.

    They are the ends, and in each of equal parts the smallest and the largest finite value of every line.
    """
    length = len(lines[0]) if lines else 0
    if length <= most:
        return np.arange(length, dtype=np.int64)
    edges = np.linspace(0, length, max(1, most // (2 * len(lines))) + 1).astype(np.int64)
    kept = {0, length - 1}
    for values in lines:
        for start, end in pairwise(edges):
            own = values[start:end]
            if np.isfinite(own).any():
                kept |= {int(start + np.nanargmin(own)), int(start + np.nanargmax(own))}
    return np.array(sorted(kept), dtype=np.int64)


Role = Literal["raw", "smooth", "evaluation", "spike"]


@dataclass(frozen=True)
class Line:
    """One line of a chart, with a value for each step; lines with the same label share their colour.

    None: the line has no point there and continues over it; a value that is not finite is a gap, which is
    counted below the chart. A "raw" line is light beside a "smooth" one; a "spike" is a mark without a line.
    """

    label: str
    values: Sequence[float | None]
    role: Role


@dataclass(frozen=True)
class _Drawn:
    """A line at the steps that are drawn: nan is a gap where there is a point."""

    label: str
    role: Role
    color: str
    is_light: bool
    values: FloatArray
    is_point: NDArray[np.bool_]

    @property
    def last(self) -> int:
        return int(np.flatnonzero(self.is_point)[-1])

    def at(self, kept: NDArray[np.int64]) -> "_Drawn":
        return replace(self, values=self.values[kept], is_point=self.is_point[kept])


def chart(
    title: str, lines: Sequence[Line], steps: Sequence[float], unit: str = "", *, log: bool = False
) -> Markup:
    """Return a `<figure>` with one chart over increasing steps; empty if no line has a point.

    Of a long line about 400 points are drawn, the smallest and largest values among them. On a logarithmic
    axis values that are not positive are gaps.
    """
    whole = list(_drawn(lines, log))
    if not whole:
        return Markup("")
    with_raw = {line.label for line in whole if line.role == "raw"}
    shapes = [line.values for line in whole if line.role != "smooth" or line.label not in with_raw]
    kept = np.union1d(kept_points(shapes, _MOST_POINTS), [line.last for line in whole])
    drawn, x = [line.at(kept) for line in whole], np.asarray(steps, dtype=np.float64)[kept]
    low, high = float(x.min()), float(x.max())
    across = Axis(low, high if high > low else low + 1, _LEFT, _RIGHT)
    shown = np.concatenate([line.values for line in drawn])
    up = Axis.around(shown[np.isfinite(shown)].tolist(), _BOTTOM, _TOP, is_log=log)
    data = {
        "box": [_LEFT, _RIGHT, _TOP, _BOTTOM],
        "xAxis": [across.low, across.high],
        "yAxis": [up.low, up.high, up.is_log],
        "steps": x.tolist(),
        "lines": [_values(line) for line in drawn],
    }
    figure = {
        "title": title,
        "unit": unit,
        **{"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "bottom": _BOTTOM},
        "scale": 1 / _FINE,
        "place": number(high),
        "json": json.dumps(data, separators=(",", ":")),
        "y_ticks": up.marks(),
        "x_ticks": across.marks(whole=True),
        "paths": [path for line in drawn for path in _paths(line, x, across, up)],
        "legend": _legend(drawn, x),
        "gaps": _gaps(whole, log),
    }
    return part("svg.jinja", "chart", figure)


def _drawn(lines: Sequence[Line], log: bool) -> Iterator[_Drawn]:
    """Yield the lines that have a point, with their colours."""
    labels = list(dict.fromkeys(line.label for line in lines))
    with_mean = {line.label for line in lines if line.role == "smooth"}
    for line in lines:
        is_point = np.array([value is not None for value in line.values])
        values = np.array([math.nan if value is None else value for value in line.values], dtype=np.float64)
        values[~np.isfinite(values) | ((values <= 0) & log)] = math.nan
        if is_point.any():
            color = f"c{labels.index(line.label) % len(COLORS)}"
            is_light = line.role == "raw" and line.label in with_mean
            yield _Drawn(line.label, line.role, color, is_light, values, is_point)


def _values(line: _Drawn) -> list[float | str | None]:
    """Return the values for the script: None where there is no point, "" for a gap."""
    return [
        None if not is_point else "" if math.isnan(value) else float(f"{value:.6g}")
        for value, is_point in zip(line.values.tolist(), line.is_point.tolist(), strict=True)
    ]


def _paths(line: _Drawn, x: FloatArray, across: Axis, up: Axis) -> list[tuple[str, str]]:
    """Return classes and data of the paths of a line; a gap interrupts it."""
    runs: list[list[str]] = [[]]
    for at, value in zip(x[line.is_point].tolist(), line.values[line.is_point].tolist(), strict=True):
        if math.isnan(value):
            runs.append([])
        else:
            runs[-1].append(f"{round(_FINE * across.place(at))} {round(_FINE * up.place(value))}")
    dots = "".join(f"M{point}h0" for run in runs for point in run)
    if line.role == "spike":
        return [(f"spike {line.color}", dots)]
    style = f"{line.role} {'light ' if line.is_light else ''}{line.color}"
    path = "".join(f"M{run[0]}h0" + "".join(f"L{point}" for point in run[1:]) for run in runs if run)
    if line.role == "evaluation":
        return [(style, path), (f"mark {line.color}", dots), ("hole", dots)]
    is_short = line.is_point.sum() <= _FEW_POINTS
    return [(style, path), *([(f"dot {style}", dots)] if is_short else [])]


def _legend(drawn: Sequence[_Drawn], steps: FloatArray) -> list[Mapping[str, Any]]:
    """Return an item for each label's curve and for each label's evaluations, with the last values."""
    items: dict[tuple[str, bool], list[int]] = {}
    for index, line in enumerate(drawn):
        items.setdefault((line.label, line.role == "evaluation"), []).append(index)
    return [
        {
            "color": drawn[indices[0]].color,
            "lines": indices,
            "mark": "ring" if is_evaluation else "stroke",
            "label": label,
            "note": " (evaluation)" if is_evaluation and (label, False) in items else "",
            "last": " · mean ".join(_last_value(drawn[index], steps) for index in indices),
        }
        for (label, is_evaluation), indices in items.items()
    ]


def _last_value(line: _Drawn, steps: FloatArray) -> str:
    value = float(line.values[line.last])
    shown = "no value" if math.isnan(value) else number(value)
    return shown if line.last == len(steps) - 1 else f"{shown} at step {number(float(steps[line.last]))}"


def _gaps(lines: Sequence[_Drawn], log: bool) -> str:
    """Return a note that counts the values that are not drawn."""
    counts: Counter[str] = Counter()
    for line in lines:
        if line.role != "smooth":
            counts[line.label] += int((line.is_point & np.isnan(line.values)).sum())
    missing = ", ".join(f"{label} {count:,}" for label, count in counts.items() if count)
    reason = "missing, not finite or not positive" if log else "missing or not finite"
    return f"{reason}: {missing}" if missing else ""


@dataclass(frozen=True)
class Point:
    """A point of a scatter with its intervals."""

    label: str
    x: float
    y: float
    x_ends: Interval
    y_ends: Interval


def scatter(points: Sequence[Point], x_title: str, y_title: str, level: tuple[float, str] | None) -> Markup:
    """Return numbered points with intervals as bars, and a legend; empty without a point.

    The horizontal axis is logarithmic; `level` is a value on the vertical one of a line with its name.
    """
    if not points:
        return Markup("")
    left, right, top, bottom = 58, 704, 14, 304
    widths = [end for point in points for end in (point.x, *(point.x_ends or ())) if end > 0]
    across = Axis.around(widths, left, right, is_log=True)
    heights = [end for point in points for end in (point.y, *(point.y_ends or ()))]
    up = Axis.around([*heights, *([level[0]] if level else [])], bottom, top)
    shown = []
    for index, point in enumerate(points):
        x, y, errors = round(across.place(point.x), 1), round(up.place(point.y), 1), ""
        if point.x_ends:
            low, high = (across.place(max(end, across.low)) for end in point.x_ends)
            errors += f"M{low:.1f} {y}H{high:.1f}"
        if point.y_ends:
            low, high = map(up.place, point.y_ends)
            errors += f"M{x} {low:.1f}V{high:.1f}"
        title = f"{point.label}: {number(point.x)}, {number(point.y)}"
        color = f"c{index % len(COLORS)}"
        shown.append({"x": x, "y": y, "errors": errors, "color": color, "label": point.label, "title": title})
    plot = {
        **{"width": 720, "height": 346, "left": left, "right": right, "top": top, "bottom": bottom},
        **{"x_title": x_title, "y_title": y_title, "x_ticks": across.marks(), "y_ticks": up.marks()},
        "level": (round(up.place(level[0]), 1), level[1]) if level else None,
        "points": shown,
    }
    return part("svg.jinja", "scatter", plot)


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    labelled: Sequence[float],
    title: str,
    limit: float | None = None,
) -> Markup:
    """Return a histogram of bins between `edges`; its axis is logarithmic for numbers from 0.

    Values of `labelled` get a label where there is room, the first ones first; `limit` is marked by a line.
    """
    width, bottom, room = 360, 92, 44
    shape: Callable[[float], float] = math.log1p if edges[0] >= 0 else float
    axis = Axis(shape(edges[0]), shape(edges[-1]), 0, width)
    largest, bars = max(counts, default=0) or 1, []
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        if count:
            x, height = axis.place(shape(low)), max(1.0, count / largest * bottom)
            own = max(1.0, axis.place(shape(high)) - x - 0.5)
            label = f"{number(low, 3)} to {number(high, 3)}: {count:,}"
            bars.append((round(x, 1), round(bottom - height, 1), round(own, 1), round(height, 1), label))
    ticks: list[tuple[float, str, str]] = []
    for value in labelled:
        x = round(axis.place(shape(value)), 1)
        if all(abs(x - other) > room for other, *_ in ticks):
            anchor = "start" if x < room / 2 else "end" if x > width - room / 2 else "middle"
            ticks.append((x, number(value, 3), anchor))
    is_marked = limit is not None and edges[0] <= limit <= edges[-1]
    plot = {
        **{"width": width, "height": bottom + 18, "bottom": bottom},
        **{"title": title, "bars": bars, "ticks": ticks},
        "limit": (round(axis.place(shape(limit or 0)), 1), number(limit or 0, 3)) if is_marked else None,
    }
    return part("svg.jinja", "histogram", plot)
