"""Parts of a Markdown document: any text in it stays text."""

import re
from collections.abc import Sequence

from dpo_dist.safe_stream import printable

_SPECIAL = re.compile(r"([\\`*_{}\[\]<()#+!|~$@&]|:(?=//)|(?<=[wW]{3})\.)")


def inert(text: str) -> str:
    """Return `text` on one line without markup, links or HTML."""
    return _SPECIAL.sub(r"\\\1", printable(" ".join(text.split())))


def code(text: str) -> str:
    """Return `text` on one line as a code span, also within a table."""
    line = printable(" ".join(text.split())).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line or ' '}{space}{fence}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown cells; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
