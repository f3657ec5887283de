"""Line charts of pages: an SVG that is complete without script, and a script that shows the values of a step.

A page with charts has, of `chart_script`, `STYLE` in its style sheet, `AXIS_SWITCH` once before its first
chart, and `SCRIPT`. Charts side by side are in an element of class "charts".
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dpo_dist.number_text import number
from dpo_dist.report.charts.axes import Axis, tick_texts, value_axis
from dpo_dist.report.charts.script import LIGHT_COLORS
from dpo_dist.report.charts.smoothing import FloatArray, kept_points
from dpo_dist.report.inert import inert_html
from dpo_dist.safe_stream import printable

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
