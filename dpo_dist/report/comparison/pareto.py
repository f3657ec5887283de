"""Picture of KL against quality, as inline SVG: intervals as bars, the frontier as a line, labels apart."""

import unicodedata
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from dpo_dist.number_text import number
from dpo_dist.report.charts.axes import Axis, tick_texts, value_axis
from dpo_dist.report.comparison.results import Estimate, Model, Results
from dpo_dist.safe_stream import printable

_WIDTH, _HEIGHT = 720.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 704.0, 14.0, 346.0
_TICKS = 6
_POINT = 5.0
_LINE, _CHARACTER = 15.0, 7.0
_LABEL_CHARACTERS = 28
_AWAY = (10, 22, 36, 52, 70, 92)

Place = tuple[float, float]
"""A point of the picture."""

PARETO_STYLE = """
.pareto { width: 100%; min-width: 600px; max-width: 860px; height: auto; display: block; }
.pareto text { font-size: 12px; fill: currentColor; stroke: Canvas; stroke-width: 3px; paint-order: stroke; }
.pareto .ticks { fill: var(--quiet); }
.pareto .grid { stroke: var(--line); }
.pareto .interval { stroke: var(--quiet); stroke-width: 1.5; }
.pareto .frontier { stroke: var(--best); stroke-width: 2; fill: none; stroke-dasharray: 6 4; }
.pareto .leader { stroke: var(--quiet); stroke-width: 0.75; }
.pareto circle { stroke: var(--best); stroke-width: 2; fill: var(--best); }
.pareto circle.behind { fill: Canvas; stroke: var(--quiet); }
"""


class Box(NamedTuple):
    """A rectangle, or a line, that labels keep free."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Return whether both have a common area."""
        return (
            self.left <= other.right
            and other.left <= self.right
            and self.top <= other.bottom
            and other.top <= self.bottom
        )


def pareto(results: Results) -> str:
    """Return the picture; empty for fewer than two models with KL and quality."""
    points = [
        (model, model.kl, quality)
        for model in results.placed()
        if model.kl and (quality := results.quality(model))
    ]
    if len(points) < 2:
        return ""
    across = value_axis((end for _, kl, _ in points for end in _ends(kl)), _LEFT, _RIGHT, is_log=False)
    up = value_axis((end for *_, quality in points for end in _ends(quality)), _BOTTOM, _TOP, is_log=False)
    measure = "score" if results.has_scores else f"win rate over {_short(results.base)}"
    frontier = results.frontier()
    places = [(across.place(kl.value), up.place(quality.value)) for _, kl, quality in points]
    bars = [_bars(across, up, kl, quality) for _, kl, quality in points]
    marks = [
        _mark(model, own, place, f"KL {number(kl.value)}, {number(quality.value)}", is_best=model in frontier)
        for (model, kl, quality), own, place in zip(points, bars, places, strict=True)
    ]
    line = _frontier_places(results, frontier, across, up)
    lines = [*_boxes(line), *(bar for own in bars for bar in own)]
    labels = _labels([_short(model.name) for model, *_ in points], places, lines)
    name = f"{measure} against KL to {results.base}"
    return (
        f'<svg class="pareto" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{_plain(name)}">{_axes(across, up, measure, results.base)}'
        f"{_frontier_line(line)}{''.join(marks)}{labels}</svg>"
    )


def place_labels(
    widths: Sequence[float], points: Sequence[Place], lines: Sequence[Box] = ()
) -> list[Box | None]:
    """Return a box for each label near its point that overlaps no point, no other box and no edge.

    Args:
        widths: of the labels, in units of the picture.
        points: of the labels.
        lines: parts of lines, which a label avoids if there is another place.

    Returns:
        None for a label without a free place.
    """
    taken = [Box(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points]
    found: list[Box | None] = [None] * len(points)
    for index in sorted(range(len(points)), key=lambda at: points[at]):
        x, y = points[index]
        near = [
            other - x
            for other, height in points
            if abs(height - y) < _LINE and abs(other - x) < widths[index]
        ]
        leftward = max(near) > 0 == min(near)  # its label beyond the neighbour's would cross that one's line
        inside = [box for box in _candidates(x, y, widths[index], leftward=leftward) if _is_inside(box)]
        free = [box for box in inside if not any(map(box.overlaps, taken))]
        clear = (box for box in free if not any(map(box.overlaps, lines)))
        found[index] = box = next(clear, free[0] if free else None)
        taken += [] if box is None else [box]
    return found


def _is_inside(box: Box) -> bool:
    return box.left >= _LEFT and box.right <= _WIDTH and box.top >= 0 and box.bottom <= _BOTTOM


def _candidates(x: float, y: float, width: float, *, leftward: bool) -> list[Box]:
    """Return places of a label, the nearest first: right, left, above and below its point, also diagonal.

    Args:
        leftward: whether left is before right.
    """
    boxes = []
    for away in _AWAY:
        lifts = (0.0,) if away == _AWAY[0] else (0.0, -away, away)
        sides = (x - away - width, x + away) if leftward else (x + away, x - away - width)
        boxes += [_box(left, y + lift - _LINE / 2, width) for lift in lifts for left in sides]
        boxes.append(_box(x - width / 2, y - away - _LINE, width))
        boxes.append(_box(x - width / 2, y + away, width))
    return boxes


def _box(left: float, top: float, width: float) -> Box:
    return Box(left, top, left + width, top + _LINE)


def _labels(names: Sequence[str], points: Sequence[Place], lines: Sequence[Box]) -> str:
    """Return the labels, with a line to their point if they are not beside it; the last resort is a title."""
    parts = []
    boxes = place_labels([_width(name) for name in names], points, lines)
    for name, (x, y), box in zip(names, points, boxes, strict=True):
        if box is None:
            continue
        nearest_x, nearest_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
        if abs(nearest_x - x) + abs(nearest_y - y) > _AWAY[1]:
            parts.append(
                f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{nearest_x:.1f}" y2="{nearest_y:.1f}"/>'
            )
        parts.append(f'<text x="{box.left:.1f}" y="{box.bottom - 4:.1f}">{_plain(name)}</text>')
    return "".join(parts)


def _mark(model: Model, bars: Sequence[Box], place: Place, text: str, *, is_best: bool) -> str:
    x, y = place
    lines = "".join(_line("interval", *bar) for bar in bars)
    kind = "" if is_best else ' class="behind"'
    return (
        f'{lines}<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="{_POINT:.0f}">'
        f"<title>{_plain(f'{model.name}: {text}')}</title></circle>"
    )


def _bars(across: Axis, up: Axis, kl: Estimate, quality: Estimate) -> list[Box]:
    """Return the intervals of a point as lines."""
    x, y = across.place(kl.value), up.place(quality.value)
    bars = []
    if kl.low is not None and kl.high is not None:
        bars.append(Box(across.place(kl.low), y, across.place(kl.high), y))
    if quality.low is not None and quality.high is not None:
        bars.append(Box(x, up.place(quality.high), x, up.place(quality.low)))
    return bars


def _frontier_places(results: Results, frontier: Sequence[Model], across: Axis, up: Axis) -> list[Place]:
    return [
        (across.place(model.kl.value), up.place(quality.value))
        for model in frontier
        if model.kl and (quality := results.quality(model))
    ]


def _frontier_line(places: Sequence[Place]) -> str:
    """Return the frontier as steps: the best quality within a KL."""
    if len(places) < 2:
        return ""
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    return f'<path class="frontier" d="M{places[0][0]:.1f} {places[0][1]:.1f}{steps}"/>'


def _boxes(places: Sequence[Place]) -> list[Box]:
    """Return the parts of the frontier."""
    parts = [(Box(x, y, to_x, y), Box(to_x, to_y, to_x, y)) for (x, y), (to_x, to_y) in pairwise(places)]
    return [part for both in parts for part in both]


def _axes(across: Axis, up: Axis, measure: str, base: str) -> str:
    parts = []
    horizontal, vertical = across.ticks(_TICKS), up.ticks(_TICKS)
    for value, text in zip(horizontal, tick_texts(horizontal), strict=True):
        x = across.place(value)
        parts.append(_line("grid", x, _TOP, x, _BOTTOM))
        parts.append(
            f'<text class="ticks" x="{x:.1f}" y="{_BOTTOM + 16:.1f}" text-anchor="middle">{text}</text>'
        )
    for value, text in zip(vertical, tick_texts(vertical), strict=True):
        y = up.place(value)
        parts.append(_line("grid", _LEFT, y, _RIGHT, y))
        parts.append(
            f'<text class="ticks" x="{_LEFT - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    middle = (_LEFT + _RIGHT) / 2
    below = _plain(f"KL to {_short(base)}, nats per response")
    parts.append(f'<text x="{middle:.1f}" y="{_BOTTOM + 40:.1f}" text-anchor="middle">{below}</text>')
    height = (_TOP + _BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{height:.1f}" text-anchor="middle" transform="rotate(-90 14 {height:.1f})">'
        f"{_plain(measure)}</text>"
    )
    return "".join(parts)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _ends(estimate: Estimate) -> list[float]:
    return [end for end in (estimate.value, estimate.low, estimate.high) if end is not None]


def _short(name: str) -> str:
    return name if len(name) <= _LABEL_CHARACTERS else name[: _LABEL_CHARACTERS - 1] + "\u2026"


def _plain(text: str) -> str:
    """Return text for SVG, in which no HTML element may be."""
    return escape(printable(text))


def _width(text: str) -> float:
    """Return an upper bound of the width of a label."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return _CHARACTER * (len(printable(text)) + wide)
