"""Small pictures for pages, as inline SVG: histograms and bars. Colours are classes of the page's style."""

import math
from collections.abc import Callable
from html import escape

from dpo_dist.diagnostics.findings import Distribution
from dpo_dist.number_text import number
from dpo_dist.safe_stream import printable

_WIDTH, _HEIGHT, _AXIS = 360.0, 92.0, 18.0
_LABEL_WIDTH = 44.0

Scale = Callable[[float], float]
"""From a value to its place on the horizontal axis."""


def histogram(values: Distribution, title: str, limit: float | None = None) -> str:
    """Return a histogram with a logarithmic axis for numbers from 0.

    Args:
        values: the distribution.
        title: text for readers that see no pictures.
        limit: a value to mark by a line, if it is on the axis.
    """
    low, high = values.edges[0], values.edges[-1]
    scale = _scale(low, high)
    largest = max(values.counts, default=0) or 1
    bars = []
    for start, stop, count in zip(values.edges, values.edges[1:], values.counts, strict=False):
        if count:
            x, height = scale(start), max(1.0, count / largest * _HEIGHT)
            width = max(1.0, scale(stop) - x - 0.5)
            label = f"{number(start, 3)} to {number(stop, 3)}: {count:,}"
            bars.append(_rect(x, _HEIGHT - height, width, height, label))
    line = ""
    if limit is not None and low <= limit <= high:
        x = scale(limit)
        name = f"<title>{number(limit, 3)}</title>"
        line = f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}">{name}</line>'
    axis = f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>{_ticks(values, scale)}'
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT + _AXIS:.0f}" role="img" '
        f'aria-label="{escape(printable(title))}">{"".join(bars)}{line}{axis}</svg>'
    )


def share_bar(share: float, title: str, low: float = 0.0) -> str:
    """Return a bar from `low` to `share` on an axis from `low` to 1."""
    width = 120 * min(max((share - low) / (1 - low), 0.0), 1.0)
    return (
        f'<svg class="bar" viewBox="0 0 120 10" role="img" aria-label="{escape(title)}">'
        f'<rect class="track" width="120" height="10" rx="3"/>{_rect(0, 0, width, 10, title)}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, title: str) -> str:
    return (
        f'<rect class="fill" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _scale(low: float, high: float) -> Scale:
    """Return a logarithmic scale for numbers from 0, a linear one if some are negative."""
    if low < 0:
        return lambda value: (value - low) / ((high - low) or 1.0) * _WIDTH
    first, span = math.log1p(low), (math.log1p(high) - math.log1p(low)) or 1.0
    return lambda value: (math.log1p(value) - first) / span * _WIDTH


def _ticks(values: Distribution, scale: Scale) -> str:
    """Return labels at the smallest, median and largest value, and between them where there is room."""
    places: list[float] = []
    labels = ""
    percentiles = values.percentiles
    for value in (
        values.smallest,
        values.largest,
        *(percentiles[p] for p in (50, 95, 25) if p in percentiles),
    ):
        x = scale(value)
        if all(abs(x - other) > _LABEL_WIDTH for other in places):
            places.append(x)
            anchor = "start" if x < _LABEL_WIDTH / 2 else "end" if x > _WIDTH - _LABEL_WIDTH / 2 else "middle"
            labels += f'<text x="{x:.1f}" y="{_HEIGHT + 13}" text-anchor="{anchor}">{number(value, 3)}</text>'
    return labels
