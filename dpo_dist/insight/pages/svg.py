"""Line charts of pages: an SVG that is complete without script, and a script that shows the values."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import number
from dpo_dist.insight.pages.render import inert_html

_PADDING = 0.05
_MOST_DECADES = 6
_SHORT = 200.0  # a logarithmic axis has ticks within a decade below this ratio of its ends


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis: `low` is drawn at the coordinate `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the coordinate of a value; of a logarithmic axis it must be positive."""
        low, high, at = (
            (math.log10(self.low), math.log10(self.high), math.log10(value))
            if self.is_log
            else (self.low, self.high, value)
        )
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """Return at most about `most` round values within the axis; `whole`: integers only."""
        if self.is_log:
            is_short = self.high < _SHORT * self.low
            subs = (1.0, 2.0, 5.0) if is_short else (1.0,)
            found = LogLocator(subs=subs, numticks=_MOST_DECADES).tick_values(self.low, self.high)
        else:
            locator = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
            found = locator.tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        within = [float(tick) for tick in found if self.low - slack <= tick <= self.high + slack]
        return within if len(within) > 1 or not self.is_log else [self.low, self.high]


def value_axis(values: Iterable[float], start: float, end: float, *, is_log: bool) -> Axis:
    """Return the axis of finite `values`, with some room at both ends."""
    found = list(values)
    low, high = (min(found), max(found)) if found else (1.0, 10.0) if is_log else (0.0, 1.0)
    if is_log:
        room = (high / low) ** _PADDING if high > low else 2.0
        return Axis(low / room, high * room, start, end, is_log=True)
    room = _PADDING * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end)


def tick_texts(ticks: list[float], *, is_log: bool = False) -> list[str]:
    """Return the ticks as text, those of a linear axis with equally many digits: 0.25 and 0.50, 10k, 2e-6."""
    largest = max(map(abs, ticks), default=0.0)
    if is_log or (largest and not 1e-3 <= largest < 1e7):
        return [number(tick) for tick in ticks]
    scale, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    for digits in range(6):
        texts = [f"{tick / scale:.{digits}f}" for tick in ticks]
        if all(
            math.isclose(float(text), tick / scale, abs_tol=1e-6 * largest / scale)
            for text, tick in zip(texts, ticks, strict=True)
        ):
            break
    return [f"{text}{suffix}" if float(text) else "0" for text in texts]


FloatArray = NDArray[np.float64]
Item = TypeVar("Item")

_SMOOTHED_SHARE = 0.06


def smoothed(values: FloatArray) -> FloatArray:
    """Return a moving mean: two passes of a centered mean over 6 % of the values.

    Values that are not finite are in no mean and stay as they are.

    Args:
        values: float64 [n].

    Returns:
        float64 [n].
    """
    is_finite = np.isfinite(values)
    half = int(_SMOOTHED_SHARE * int(is_finite.sum()) / 2)
    index = np.arange(len(values))
    first = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, len(values))
    counts = _window_sums(is_finite.astype(np.float64), first, end)
    means = np.where(is_finite, values, 0.0)
    for _ in range(2 if half else 0):
        means = np.where(is_finite, _window_sums(means, first, end) / np.maximum(counts, 1.0), 0.0)
    return np.where(is_finite, means, values)


def _window_sums(values: FloatArray, first: NDArray[np.int64], end: NDArray[np.int64]) -> FloatArray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(sums[end] - sums[first], dtype=np.float64)


def evenly(rows: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` rows at equal distances, the first and the last among them."""
    count = min(len(rows), most)
    return [rows[round(at * (len(rows) - 1) / max(count - 1, 1))] for at in range(count)]


def kept_points(lines: list[FloatArray], most: int) -> NDArray[np.int64]:
    """Return increasing indices of at most about `most` points that show the shape of all lines.

    In each of equal parts of the curve the smallest and the largest value of every line are kept, and the
    first and the last point of the curve.

    Args:
        lines: float64 [n] each; values that are not finite are no extremes.
        most: number of points.
    """
    length = len(lines[0]) if lines else 0
    if length <= most:
        return np.arange(length, dtype=np.int64)
    parts = max(1, most // (2 * len(lines)))
    edges = np.linspace(0, length, parts + 1).astype(np.int64)
    kept = {0, length - 1}
    for values in lines:
        low, high = (
            np.where(np.isfinite(values), values, np.inf),
            np.where(np.isfinite(values), values, -np.inf),
        )
        for start, end in pairwise(edges):
            if np.isfinite(values[start:end]).any():
                kept |= {int(start + low[start:end].argmin()), int(start + high[start:end].argmax())}
    return np.array(sorted(kept), dtype=np.int64)


LIGHT_COLORS = ("#0072b2", "#c85200", "#00805c", "#a3478c", "#8f6a00", "#5b6470")
"""Colours of lines on white that colour-blind people can distinguish: after Okabe and Ito
(https://jfly.uni-koeln.de/color/), darkened to a contrast of 4 to white."""
_DARK_COLORS = ("#5eb5f0", "#ff9447", "#33cfa3", "#e79bcb", "#e6c24a", "#b3bcc8")

AXIS_SWITCH = (
    '<fieldset class="axis-switch"><legend>Curves over</legend>'
    '<label><input type="radio" name="axis" id="axis-steps" checked> steps</label>'
    '<label><input type="radio" name="axis" id="axis-hours"> hours</label></fieldset>'
)


def _variables(colors: tuple[str, ...]) -> str:
    return ":root { " + " ".join(f"--c{index}: {color};" for index, color in enumerate(colors)) + " }"


STYLE = (
    f"""
{_variables(LIGHT_COLORS)}
@media (prefers-color-scheme: dark) {{ {_variables(_DARK_COLORS)} }}
"""
    + """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 22px; }
.curves { margin: 0; min-width: 0; max-width: none; }
.curves figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 14px; }
.curves small, .curves .place { color: var(--quiet); font-weight: 400; font-size: 12px; }
.curves .place { white-space: nowrap; }
.curves svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.curves:focus-visible { outline: 2px solid var(--c0); outline-offset: 4px; border-radius: 4px; }
.curves text { font-size: 11px; fill: var(--quiet); }
.curves path { fill: none; vector-effect: non-scaling-stroke; }
.curves .grid { stroke: var(--line); stroke-width: 1; }
.curves .axis, .curves .tick { stroke: var(--quiet); stroke-width: 1; }
.curves .raw, .curves .smooth, .curves .evaluation { stroke: currentColor; stroke-linecap: round; }
.curves .raw, .curves .smooth, .curves .evaluation { stroke-linejoin: round; stroke-width: 2; }
.curves .light { stroke-width: 1; opacity: .38; }
.curves .evaluation { stroke-width: 1; stroke-dasharray: 3 3; }
.curves .dot { stroke-width: 5; }
.curves .mark, .curves .spike { stroke: currentColor; stroke-width: 8; stroke-linecap: round; }
.curves .hole { stroke: Canvas; stroke-width: 4; stroke-linecap: round; }
.curves .cursor line { stroke: var(--quiet); stroke-width: 1; }
.curves .cursor circle { fill: currentColor; stroke: Canvas; stroke-width: 1.5; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 14px; }
.legend { font-size: 13px; font-variant-numeric: tabular-nums; }
.legend b { font-weight: 600; }
.legend li { overflow-wrap: anywhere; }
.legend i { display: inline-block; margin-right: 5px; vertical-align: middle; }
.stroke { width: 16px; border-top: 3px solid currentColor; }
.ring { width: 6px; height: 6px; border: 2px solid currentColor; border-radius: 9px; }
.gaps { display: block; }
.at-hours { display: none; }
:root:has(#axis-hours:checked) .timed .at-hours { display: inline; }
:root:has(#axis-hours:checked) .timed .at-steps { display: none; }
.axis-switch { border: 0; padding: 0; margin: 8px 0 14px; display: flex; gap: 14px; font-size: 14px; }
.axis-switch legend { float: left; margin-right: 14px; color: var(--quiet); padding: 0; }
"""
)

SCRIPT = """
"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const hoursBox = document.getElementById("axis-hours");
  const text = value => {
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-3)) {
      const [digits, exponent] = value.toExponential(2).split("e");
      return Number(digits) + "e" + Number(exponent);
    }
    return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));
  };
  const between = (value, [low, high], start, end) =>
    start + (value - low) / (high - low || 1) * (end - start);

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.svg = figure.querySelector("svg");
      this.cursor = figure.querySelector(".cursor");
      this.place = figure.querySelector(".place");
      this.items = [...figure.querySelectorAll(".legend li")].map(item => ({
        color: item.className, output: item.querySelector("b"),
        lines: item.dataset.lines.split(" ").map(Number),
      }));
      this.data = JSON.parse(figure.dataset.chart);
      this.at = null;
      this.order();
    }
    order() {
      this.isTimed = Boolean(this.data.hourAxis && hoursBox && hoursBox.checked);
      this.points = this.data.lines.map(line => {
        const xs = this.isTimed ? line.hours || [] : this.data.steps;
        return line.values.map((value, i) => ({x: xs[i], step: this.data.steps[i], value, i}))
          .filter(point => point.value !== null && typeof point.x === "number").sort((a, b) => a.x - b.x);
      });
      this.xs = [...new Set(this.points.flat().map(point => point.x))].sort((a, b) => a - b);
    }
    nearest(x) {
      const nearer = (best, each) => Math.abs(each - x) < Math.abs(best - x) ? each : best;
      return this.xs.reduce(nearer, this.xs[0]);
    }
    valueAt(pointer) {
      const area = this.svg.getBoundingClientRect();
      const [left, right] = this.data.box;
      const x = (pointer.clientX - area.left) / area.width * this.svg.viewBox.baseVal.width;
      const axis = this.isTimed ? this.data.hourAxis : this.data.stepAxis;
      return axis[0] + (x - left) / (right - left) * (axis[1] - axis[0]);
    }
    last(line, x) {
      return this.points[line].filter(point => point.x <= x).pop();
    }
    describe(line, x) {
      const point = this.last(line, x);
      if (!point) return "none yet";
      const value = point.value === "" ? "no value" : text(point.value);
      return point.x === x ? value : value + " at step " + text(point.step);
    }
    show(x) {
      if (!this.xs.length) return;
      const isEnd = x === null;
      this.at = isEnd ? null : this.nearest(x);
      const at = isEnd ? this.xs[this.xs.length - 1] : this.at;
      for (const item of this.items) {
        item.output.textContent = item.lines.map(line => this.describe(line, at)).join(" \\u00b7 mean ");
      }
      const point = this.points.flat().find(each => each.x === at);
      const hours = this.isTimed ? " \\u00b7 " + text(at) + " h" : "";
      this.place.textContent = "step " + text(point.step) + hours;
      this.cursor.replaceChildren(...(isEnd ? [] : this.marks(at)));
    }
    marks(at) {
      const {box: [left, right, top, bottom], stepAxis, hourAxis, yAxis: [low, high, isLog]} = this.data;
      const x = between(at, this.isTimed ? hourAxis : stepAxis, left, right);
      const scale = isLog ? Math.log10 : value => value;
      const made = (name, values) => {
        const element = document.createElementNS(NS, name);
        for (const [key, value] of Object.entries(values)) element.setAttribute(key, value);
        return element;
      };
      const dots = this.items.map(item => {
        const point = this.last(item.lines[item.lines.length - 1], at);
        if (!point || point.x !== at || point.value === "") return null;
        const y = between(scale(point.value), [scale(low), scale(high)], bottom, top);
        return made("circle", {cx: x, cy: y, r: 4, class: item.color});
      });
      return [made("line", {x1: x, x2: x, y1: top, y2: bottom}), ...dots.filter(Boolean)];
    }
    move(key) {
      const last = this.xs.length - 1;
      const now = this.at === null ? last : this.xs.indexOf(this.at);
      const to = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last,
                  PageUp: now - 10, PageDown: now + 10}[key];
      return to === undefined ? undefined : this.xs[Math.min(Math.max(to, 0), last)];
    }
  }

  const charts = [...document.querySelectorAll("figure.curves")].map(figure => new Chart(figure));
  const showAll = (from, x) => {
    for (const chart of charts) if (chart.isTimed === from.isTimed) chart.show(x);
  };
  for (const chart of charts) {
    const follow = event => showAll(chart, chart.valueAt(event));
    chart.svg.addEventListener("pointermove", follow);
    chart.svg.addEventListener("pointerdown", follow);
    chart.svg.addEventListener("pointerleave", event => {
      if (event.pointerType === "mouse") showAll(chart, null);
    });
    chart.figure.tabIndex = 0;
    chart.figure.addEventListener("focus", () => chart.figure.querySelector(".legend").ariaLive = "polite");
    chart.figure.addEventListener("blur", () => {
      chart.figure.querySelector(".legend").ariaLive = "off";
      showAll(chart, null);
    });
    chart.figure.addEventListener("keydown", event => {
      const x = event.key === "Escape" ? null : chart.move(event.key);
      if (x === undefined) return;
      event.preventDefault();
      showAll(chart, x);
    });
  }
  for (const box of document.querySelectorAll("input[name=axis]")) {
    box.addEventListener("change", () => {
      for (const chart of charts) { chart.order(); chart.show(null); }
    });
  }
})();
"""


Role = Literal["raw", "smooth", "evaluation", "spike"]
Values = Sequence[float | None]

_MOST_POINTS = 400
_FEW_POINTS = 30
_WIDTH, _HEIGHT = 380, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 364.0, 8.0, 184.0
_FINE = 10  # paths have whole coordinates in tenths of a pixel
_SECONDS = 3600


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: name in the legend, plain text. Lines with the same label share their colour.
        values: a value for each step of the chart. None: the line has no point there and continues over it.
            nan or infinite: a gap, which is counted below the chart.
        role: "raw" is light if the label also has a "smooth" line; a "spike" is a mark without a line.
        hours: hours of these points, if they are not those of the chart.
    """

    label: str
    values: Values
    role: Role
    hours: Values | None = None


@dataclass(frozen=True)
class _Drawn:
    """A line at the points of its chart that are drawn."""

    line: Line
    color: str
    style: str
    values: FloatArray
    hours: FloatArray | None
    is_point: NDArray[np.bool_]

    @property
    def is_shown(self) -> NDArray[np.bool_]:
        return self.is_point & np.isfinite(self.values)


def chart(
    title: str,
    lines: Sequence[Line],
    steps: Sequence[float],
    hours: Sequence[float] | None = None,
    unit: str = "",
    *,
    log: bool = False,
) -> str:
    """Return a `<figure>` with one chart.

    Of a long line about 400 points are drawn, the smallest and largest values among them.

    Args:
        title: plain text.
        lines: what is drawn, each with a value for each of `steps`.
        steps: increasing.
        hours: training time at each step; with it the chart has a second horizontal axis, which the page's
            switch selects.
        unit: of the values, plain text.
        log: logarithmic axis; values that are not positive are gaps, which are counted below the chart.

    Returns:
        HTML; empty if no line has a point.
    """
    colors = {label: index for index, label in enumerate(dict.fromkeys(line.label for line in lines))}
    with_mean = {line.label for line in lines if line.role == "smooth"}
    whole = [
        _drawn(line, f"c{colors[line.label] % len(LIGHT_COLORS)}", line.label in with_mean, hours, log)
        for line in lines
    ]
    whole = [line for line in whole if line.is_point.any()]
    if not whole:
        return ""
    with_raw = {each.line.label for each in whole if each.line.role == "raw"}
    shapes = [each for each in whole if each.line.role != "smooth" or each.line.label not in with_raw]
    ends = [int(np.flatnonzero(each.is_point)[-1]) for each in whole]
    kept = np.union1d(kept_points([each.values for each in shapes], _MOST_POINTS), ends)
    drawn = [_at(each, kept) for each in whole]
    x = np.asarray(steps, dtype=np.float64)[kept]
    shown = [float(value) for each in drawn for value in each.values[each.is_shown]]
    y_axis = value_axis(shown, _BOTTOM, _TOP, is_log=log)
    step_axis = _time_axis(x, least=1.0)
    hour_axis = _hour_axis(drawn)
    groups = _group("at-steps", [(each, x) for each in drawn], step_axis, y_axis, "step")
    if hour_axis is not None:
        timed = [(each, each.hours) for each in drawn if each.hours is not None]
        groups += _group("at-hours", timed, hour_axis, y_axis, "hours")
    heading = inert_html(title) + (f" <small>{inert_html(unit)}</small>" if unit else "")
    data = json.dumps(_data(drawn, x, step_axis, hour_axis, y_axis), separators=(",", ":"))
    return (
        f'<figure class="curves{" timed" if hour_axis else ""}" data-chart="{escape(data)}">'
        f'<figcaption><b>{heading}</b><span class="place">{_place(x[-1])}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(printable(title))}">'
        f'{_value_ticks(y_axis)}{groups}<g class="cursor"></g></svg>'
        f'<ul class="legend">{_legend(drawn, x)}</ul>{_gaps(whole, log)}</figure>'
    )


def _drawn(line: Line, color: str, has_mean: bool, hours: Sequence[float] | None, log: bool) -> _Drawn:
    values = np.array([math.nan if value is None else value for value in line.values], dtype=np.float64)
    is_point = np.array([value is not None for value in line.values], dtype=np.bool_)
    values[~np.isfinite(values) | ((values <= 0) & log)] = math.nan
    own = line.hours if line.hours is not None else hours
    times = (
        None if own is None else np.array([math.nan if at is None else at for at in own], dtype=np.float64)
    )
    style = "raw light" if line.role == "raw" and has_mean else line.role
    return _Drawn(line, color, style, values, times, is_point)


def _at(drawn: _Drawn, kept: NDArray[np.int64]) -> _Drawn:
    hours = None if drawn.hours is None else drawn.hours[kept]
    return replace(drawn, values=drawn.values[kept], hours=hours, is_point=drawn.is_point[kept])


def _time_axis(values: FloatArray, least: float) -> Axis:
    low, high = float(values.min()), float(values.max())
    room = 0.0 if high > low else least
    return Axis(low - room, high + room, _LEFT, _RIGHT)


def _hour_axis(drawn: Sequence[_Drawn]) -> Axis | None:
    known = [each.hours[np.isfinite(each.hours)] for each in drawn if each.hours is not None]
    together = np.concatenate(known) if known else np.empty(0)
    return _time_axis(together, least=1 / _SECONDS) if len(together) else None


def _group(
    name: str, lines: Sequence[tuple[_Drawn, FloatArray]], x_axis: Axis, y_axis: Axis, label: str
) -> str:
    """Return the horizontal axis and all lines over it."""
    paths = "".join(path for drawn, x in lines for path in _paths(drawn, x, x_axis, y_axis))
    return f'<g class="{name}">{_time_ticks(x_axis, label)}<g transform="scale({1 / _FINE})">{paths}</g></g>'


def _paths(drawn: _Drawn, x: FloatArray, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    is_known = np.isfinite(x)
    points: list[tuple[int, int] | None] = [
        (round(_FINE * x_axis.place(at)), round(_FINE * y_axis.place(value))) if shows else None
        for at, value, shows in zip(
            x[drawn.is_point & is_known].tolist(),
            drawn.values[drawn.is_point & is_known].tolist(),
            drawn.is_shown[drawn.is_point & is_known].tolist(),
            strict=True,
        )
    ]
    color, is_spike = drawn.color, drawn.line.role == "spike"
    dots = "".join(f"M{point[0]} {point[1]}h0" for point in points if point)
    if not dots:
        return
    yield f'<path class="{drawn.style} {color}" d="{dots if is_spike else _connected(points)}"/>'
    if drawn.line.role == "evaluation":
        yield f'<path class="mark {color}" d="{dots}"/><path class="hole" d="{dots}"/>'
    elif len(points) <= _FEW_POINTS and not is_spike:
        yield f'<path class="dot {drawn.style} {color}" d="{dots}"/>'


def _connected(points: Sequence[tuple[int, int] | None]) -> str:
    """Return the path data of a line with a gap at each None, in relative coordinates to be short."""
    parts: list[str] = []
    last: tuple[int, int] | None = None
    for point in points:
        if point is not None:
            if last is None:
                parts.append(f"M{point[0]} {point[1]}h0")
            else:
                parts.append(f"l{point[0] - last[0]} {point[1] - last[1]}")
        last = point
    return "".join(parts)


def _value_ticks(axis: Axis) -> str:
    ticks = axis.ticks(5)
    return "".join(
        f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{_RIGHT:g}"/>'
        f'<text x="{_LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for y, text in zip(map(axis.place, ticks), tick_texts(ticks, is_log=axis.is_log), strict=True)
    )


def _time_ticks(axis: Axis, label: str) -> str:
    ticks = axis.ticks(5, whole=label == "step")
    marks = "".join(
        f'<path class="tick" d="M{x:.1f} {_BOTTOM:g}v4"/>'
        f'<text x="{x:.1f}" y="{_BOTTOM + 16:g}" text-anchor="middle">{text}</text>'
        for x, text in zip(map(axis.place, ticks), tick_texts(ticks), strict=True)
    )
    base = f'<path class="axis" d="M{_LEFT:g} {_BOTTOM:g}H{_RIGHT:g}"/>'
    return f'{base}{marks}<text x="{_RIGHT:g}" y="{_HEIGHT - 3}" text-anchor="end">{label}</text>'


def _legend(drawn: Sequence[_Drawn], steps: FloatArray) -> str:
    """Return an item for each label's curve and for each label's evaluations, with the last values."""
    items = []
    for indices in _items(drawn):
        first = drawn[indices[0]]
        is_evaluation = first.line.role == "evaluation"
        other = any(each.line.label == first.line.label and each.line.role != "evaluation" for each in drawn)
        note = " (evaluation)" if is_evaluation and other else ""
        texts = [_last_value(drawn[index], steps) for index in indices]
        text = " · mean ".join(texts)
        items.append(
            f'<li class="{first.color}" data-lines="{" ".join(map(str, indices))}">'
            f'<i class="{"ring" if is_evaluation else "stroke"}"></i>{inert_html(first.line.label)}{note} '
            f"<b>{text}</b></li>"
        )
    return "".join(items)


def _items(drawn: Sequence[_Drawn]) -> list[list[int]]:
    """Return the lines of each item of the legend: raw and smooth of one label together, raw first."""
    items: dict[tuple[str, bool], list[int]] = {}
    for index, each in enumerate(drawn):
        items.setdefault((each.line.label, each.line.role == "evaluation"), []).append(index)
    return [sorted(indices, key=lambda index: drawn[index].line.role) for indices in items.values()]


def _last_value(drawn: _Drawn, steps: FloatArray) -> str:
    index = int(np.flatnonzero(drawn.is_point)[-1])
    value = _short(float(drawn.values[index]))
    text = number(value) if value is not None else "no value"
    return text if index == len(steps) - 1 else f"{text} at step {number(float(steps[index]))}"


def _place(step: float) -> str:
    return f"step {number(float(step))}"


def _gaps(lines: Sequence[_Drawn], log: bool) -> str:
    """Return a note that counts the values that are not drawn."""
    counts: Counter[str] = Counter()
    for each in lines:
        if each.line.role != "smooth":
            counts[each.line.label] += int((each.is_point & ~each.is_shown).sum())
    missing = [f"{inert_html(label)} {count:,}" for label, count in counts.items() if count]
    reason = "missing, not finite or not positive" if log else "missing or not finite"
    return (
        f'<small class="gaps">Gaps: values that are {reason}: {", ".join(missing)}.</small>'
        if missing
        else ""
    )


def _data(
    drawn: Sequence[_Drawn], steps: FloatArray, step_axis: Axis, hour_axis: Axis | None, y_axis: Axis
) -> dict[str, object]:
    """Return the values for the script: null where a line has no point, "" where it has a gap."""
    return {
        "box": [_LEFT, _RIGHT, _TOP, _BOTTOM],
        "steps": steps.tolist(),
        "stepAxis": [step_axis.low, step_axis.high],
        "hourAxis": [hour_axis.low, hour_axis.high] if hour_axis else None,
        "yAxis": [y_axis.low, y_axis.high, y_axis.is_log],
        "lines": [
            {
                "values": [
                    _short(value) if is_shown else "" if is_point else None
                    for value, is_shown, is_point in zip(
                        each.values.tolist(), each.is_shown.tolist(), each.is_point.tolist(), strict=True
                    )
                ],
                "hours": None if each.hours is None else [_short(at) for at in each.hours.tolist()],
            }
            for each in drawn
        ],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
