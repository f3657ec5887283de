"""What pages are made of: a page is a list of blocks, and a terminal prints the same tables."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpo_dist.foundation.text import aligned
from dpo_dist.tools.pages.thumbnails import Thumbnails

FloatArray = NDArray[np.float64]
Interval = Sequence[float] | None
Piece = tuple[str, str]
"""A part of a text, and its CSS classes: some of "special trained cut omitted role"."""
LineRole = Literal["line", "light", "mean", "evaluation", "spike", "point"]
"""What a line of a chart is: "light" are the values behind their mean."""

COLORS = ("#0072b2", "#c85200", "#00805c", "#a3478c", "#8f6a00", "#5b6470")
"""Colours of lines on white that colour-blind people can distinguish: after Okabe and Ito
(https://jfly.uni-koeln.de/color/), darkened to a contrast of 4 to white. page.css has them too."""

_LARGEST = 1e100  # an axis of a larger value has no ticks
_MOST_POINTS = 400
_SUFFIXES: Mapping[str, str] = {"mean": ", mean", "evaluation": " (evaluation)"}


class Heading(NamedTuple):
    """The title of a section."""

    text: str


class Text(NamedTuple):
    """A paragraph, with names in backticks as code.

    `kind`: "note" in small letters, "code" as it is; "good", "warning" and "error" in a box, whose `title`
    is bold.
    """

    text: str
    kind: str = ""
    title: str = ""


class Table(NamedTuple):
    """Rows below titles; what follows a line end in a cell is in small letters below it.

    `kind`: "numbers" or "facts" (names and values).
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "numbers"

    def lines(self) -> list[str]:
        """Return the table for a terminal."""
        return aligned([[cell.replace("\n", " ") for cell in row] for row in (self.titles, *self.rows)])


@dataclass(frozen=True)
class Line:
    """A line of a chart, with increasing `xs`; lines with the same label share their colour.

    A value that is not finite or too large to draw becomes a gap. `ends`: the interval of each value.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    role: LineRole = "line"
    ends: Sequence[Interval] = ()

    @property
    def values(self) -> FloatArray:
        """The values, with nan for gaps."""
        values = np.array(self.ys, dtype=np.float64)
        values[~(np.abs(values) < _LARGEST)] = math.nan
        return values

    @property
    def name(self) -> str:
        """The label, and what the line is of it."""
        return self.label + _SUFFIXES.get(self.role, "")

    def extremes(self, most: int) -> list[int]:
        """Return the indices of about `most` points that keep the line's shape.

        They are both ends, and in each of equal parts the smallest and the largest value.
        """
        values = self.values
        if len(values) <= most:
            return list(range(len(values)))
        kept = {0, len(values) - 1}
        for part in np.array_split(np.arange(len(values)), most // 2):
            if np.isfinite(values[part]).any():
                kept.add(int(part[np.nanargmin(values[part])]))
                kept.add(int(part[np.nanargmax(values[part])]))
        return sorted(kept)


@dataclass(frozen=True)
class Chart:
    """Lines over steps or over another value.

    `ticks`: texts of values of the horizontal axis, which then has no other ones. `note`: what stands below.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    over: str = "step"
    has_log_values: bool = False
    is_log: bool = False
    ticks: Mapping[float, str] | None = None
    note: str = ""

    @property
    def labels(self) -> list[str]:
        """The labels in the order of their colours."""
        return list(dict.fromkeys(line.label for line in self.lines))

    @property
    def data(self) -> str:
        """What page.js draws, as JSON of ASCII characters without a text of the user but ticks."""
        most = _MOST_POINTS // max(1, len(self.lines))
        lines = []
        for line in self.lines:
            kept = line.extremes(most)
            values = line.values
            values[(values <= 0) & self.has_log_values] = math.nan
            fields = {
                "xs": [line.xs[index] for index in kept],
                "ys": [
                    None if math.isnan(values[index]) else float(f"{values[index]:.6g}") for index in kept
                ],
                "role": line.role,
                "color": self.labels.index(line.label),
                "ends": line.ends,
            }
            lines.append(fields)
        ticks = None if self.ticks is None else list(self.ticks.items())
        options = {"over": self.over, "hasLogValues": self.has_log_values, "isLog": self.is_log}
        return json.dumps({"lines": lines, "ticks": ticks, **options})


class Answers(NamedTuple):
    """A prompt, folded, with responses side by side: name, notes and text of each."""

    title: str
    notes: str
    prompt: Sequence[Piece]
    responses: Sequence[tuple[str, str, Sequence[Piece]]]
    images: Thumbnails = ()
    is_open: bool = False


class Folded(NamedTuple):
    """Blocks below a title that opens them."""

    title: str
    blocks: Sequence[Any]


class Choices(NamedTuple):
    """A form: hidden fields, a field for a text, and buttons with their value, title and keys."""

    buttons: Sequence[tuple[str, str, str]]
    hidden: Mapping[str, str]
    field: str = ""


PageBlock: TypeAlias = Heading | Text | Table | Chart | Answers | Folded | Choices


def titled_section(title: str, blocks: Iterable[PageBlock]) -> list[PageBlock]:
    """Return a heading and its blocks; nothing without a block."""
    blocks = list(blocks)
    return [Heading(title), *blocks] if blocks else []


def above_interval(value: str, low: str, high: str) -> str:
    """Return a cell: a value, and below it its interval."""
    return f"{value}\n[{low}, {high}]"
