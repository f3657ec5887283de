"""The frame and the blocks of pages: one file that loads nothing; text of data stays inert."""

import base64
import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

_PLAIN = "\n\t "
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
# Letters and marks without a shape: fillers, the grapheme joiner; and the replacement character.
_OTHERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufffd")
_NAMES = {"\r": "CR", "\0": "NUL", "\x1b": "ESC"}


def is_invisible(character: str) -> bool:
    """Return whether a character has no shape or changes the direction of text; not space and line end."""
    if character in _PLAIN:
        return False
    return character in _OTHERS or unicodedata.category(character) in _INVISIBLE_CATEGORIES


def inert_html(text: str) -> str:
    """Return `text` as HTML without markup; invisible and bidirectional control characters become marks."""
    if text.isascii() and text.isprintable():
        return escape(text)
    return "".join(_mark(each) if is_invisible(each) else escape(each) for each in text)


def joined_origins(examples: Sequence[str], most: int) -> str:
    """Return the first origins, with a file named once: "data.jsonl:3, :9 (with :2); other.jsonl:1".

    Args:
        examples: origins of records; of a group of records joined by ", ".
        most: number of examples.
    """
    shown, file = "", ""
    for example in examples[:most]:
        names = []
        for origin in example.split(", "):
            path, _, line = origin.rpartition(":")
            names.append(f":{line}" if path == file and path else origin)
            file = path
        first, *others = names
        between = "" if not shown else ", " if first.startswith(":") else "; "
        shown += between + first + (f" (with {', '.join(others)})" if others else "")
    return shown


def _mark(character: str) -> str:
    code = f"U+{ord(character):04X}"
    name = escape(unicodedata.name(character, code))
    return f'<i class="mark" title="{name}">{_NAMES.get(character, code)}</i>'


def html_page(title: str, sections: Iterable[str], more_style: str = "", script: str = "") -> str:
    """Return a page.

    Args:
        title: plain text.
        sections: HTML; empty ones are omitted.
        more_style: style sheet after the common one.
        script: of the page, without which it is complete. None by default.
    """
    style = _STYLE + more_style
    page = _FRAME.format(
        style_digest=_digest(style),
        script_policy=f"script-src {_digest(script)}; " if script else "",
        title=escape(title),
        style=style,
        body="\n".join(filter(None, sections)),
        script=f"<script>{script}</script>\n" if script else "",
    )
    # A lone surrogate in a path cannot be encoded.
    return page.encode("utf-8", "replace").decode("utf-8")


def html_bytes(html: str) -> int:
    """Return the number of bytes that a part needs in a page."""
    return len(html.encode("utf-8", "replace"))


def _digest(text: str) -> str:
    """Return a source of the page's policy that allows `text` only."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src {style_digest}; \
{script_policy}img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
{script}</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #d9dde3; --quiet: #6b7280; --tile: #f5f7fa; --mark: #ffe9a8; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4150; --quiet: #9aa3b2; --tile: #1f2430; --mark: #6b5310; }
}
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px; }
header { display: flex; align-items: center; gap: 14px; flex-wrap: wrap; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 8px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
a { color: inherit; }
code { font-size: 13px; overflow-wrap: anywhere; }
.mark { background: var(--mark); border-radius: 3px; padding: 0 3px; unicode-bidi: isolate; }
.mark { font: 11px ui-monospace, monospace; }
.badge { padding: 2px 12px; border-radius: 99px; color: #fff; background: #6b7280; font-size: 14px; }
.badge.completed { background: #1a7f5a; }
.badge.preempted { background: #b45f06; }
.badge.diverged, .badge.error { background: #b3264a; }
.badge.warning { background: #a85b06; }
.badge.note { background: #4b6a9b; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; }
.tiles { margin: 20px 0; }
.tiles div { background: var(--tile); border-radius: 8px; padding: 12px 14px; }
.tiles b { display: block; font-size: 24px; line-height: 1.3; }
.tiles span, .tiles small { display: block; color: var(--quiet); font-size: 13px; }
img { width: 100%; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
section, details, .wide { overflow-x: auto; }
.wide th { width: auto; white-space: nowrap; }
th, td { text-align: left; vertical-align: top; padding: 5px 16px 5px 0; }
th, td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--quiet); width: 240px; }
.phases { width: auto; }
.phases td { text-align: right; }
.phases meter { width: 320px; }
.numbers th, .numbers td { text-align: right; width: auto; }
.explained { color: var(--quiet); font-size: 13px; margin: 6px 0; }
details { margin-top: 32px; }
summary { cursor: pointer; font-weight: 600; }
"""


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


MOST_ROW_BYTES = 32 * 2**20

Row = dict[str, Any]


def json_rows(file: Path, most_bytes: int | None = None) -> Iterator[Row | None]:
    """Yield the rows of a file in its order; None for a line that is no JSON object or over 32 MiB.

    Args:
        file: its path; a missing file has no rows.
        most_bytes: reading ends with the line that exceeds them. None: the whole file.

    Raises:
        OSError: the file exists and cannot be read.
    """
    try:
        opened = file.open("rb")
    except FileNotFoundError:
        return
    read = 0
    with opened:
        while line := opened.readline(MOST_ROW_BYTES):
            read += len(line)
            if line.endswith(b"\n") or len(line) < MOST_ROW_BYTES:
                if line.strip():
                    yield _row(line)
            else:
                while (rest := opened.readline(MOST_ROW_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield None
            if most_bytes is not None and read > most_bytes:
                return


def text_of(row: Mapping[str, Any], name: str) -> str | None:
    """Return a field of a row; None if it is missing or no text."""
    value = row.get(name)
    return value if isinstance(value, str) else None


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
