"""Tables and cells for the terminal."""

import re
import textwrap
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return each row as a line, with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def with_interval(value: float, ends: Sequence[float] | None, form: str) -> str:
    """Return "0.512 [0.480, 0.544]"; without `ends` the value only."""
    return f"{value:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")


def wrapped(line: str, width: int) -> list[str]:
    """Return a line of a result, broken between words at `width` columns where that is possible.

    What follows is indented to the text after a label ("time       1 min of training"), else by four columns.
    """
    label = re.match(r"\S+( \S+)* {2,}", line)
    indent = " " * (label.end() if label and label.end() <= width // 2 else 4)
    parts = textwrap.wrap(
        line, max(width, 8), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return parts or [line]
