"""Blocks of pages: sections, tables, folded parts; cells and contents are HTML already."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TypeVar

from dpo_dist.report.inert import inert_html

MOST_ROWS = 200
"""Rows of a table; the number of further ones is written below it."""

Subject = TypeVar("Subject")

_log = logging.getLogger(__name__)


def made(make: Callable[[Subject], str], subject: Subject, page: str) -> str:
    """Return the section from `make`; empty, with a warning, if a file has other content than expected.

    No run may fail because of its report.

    Args:
        make: function that returns a section.
        subject: of the page.
        page: its name in the warning.
    """
    try:
        return make(subject)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        _log.warning("%s of the %s is omitted: %s: %s", make.__name__, page, type(error).__name__, error)
        return ""


def section(name: str, title: str, *contents: str) -> str:
    """Return a section with a heading; empty without content."""
    content = "".join(contents)
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def folded(title: str, content: str) -> str:
    """Return content that a click unfolds; empty without content."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def paragraph(*sentences: str) -> str:
    """Return sentences, plain text, as one paragraph; empty without any."""
    joined = " ".join(filter(None, sentences))
    return f"<p>{inert_html(joined)}</p>" if joined else ""


def note(*sentences: str) -> str:
    """Return an explanation in small letters, of plain text."""
    return paragraph(*sentences).replace("<p>", '<p class="explained">', 1)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """Return a table with titles of plain text; empty without rows."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    if not lines:
        return ""
    titles = "".join(f"<th>{inert_html(title)}</th>" for title in head)
    more = note(f"{len(lines) - MOST_ROWS:,} further rows are not shown.") if len(lines) > MOST_ROWS else ""
    body = "".join(lines[:MOST_ROWS])
    return f'<div class="wide"><table class="{kind}"><tr>{titles}</tr>{body}</table></div>{more}'


def facts_table(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names with values, plain text, as a table; empty without any."""
    lines = [f"<tr><th>{inert_html(key)}</th><td>{inert_html(value)}</td></tr>" for key, value in pairs]
    return f'<table class="facts">{"".join(lines)}</table>' if lines else ""


def flat(fields: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested fields as dotted keys with the text of their values."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", text(value)


def text(value: object) -> str:
    """Return the text of a value of a configuration."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return "; ".join(map(text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
