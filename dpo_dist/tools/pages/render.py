"""Render a page as one file, from a template and the style sheet; text of data stays inert."""

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import as_yaml, duration, number, percent, pluralize
from dpo_dist.foundation.types import dotted_items

_FOLDER = Path(__file__).parent / "templates"
_PLAIN = "\n\t "
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
# Letters and marks that draw nothing (fillers, the grapheme joiner), and the replacement character.
_OTHERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufffd")
_NAMES = {"\r": "CR", "\0": "NUL", "\x1b": "ESC"}


def inert(value: object) -> Markup:
    """Return a value as HTML; text is escaped, and invisible and bidirectional characters become marks.

    Every expression of a template passes through this function, so that text of data cannot act on a page.
    """
    if isinstance(value, Markup):
        return value
    text = "" if value is None else str(value)
    if text.isascii() and text.isprintable():
        return Markup(escape(text))  # noqa: S704
    return Markup("".join(map(_inert_character, text)))  # noqa: S704


def _inert_character(character: str) -> str:
    is_shown = character not in _OTHERS and unicodedata.category(character) not in _INVISIBLE_CATEGORIES
    if is_shown or character in _PLAIN:
        return escape(character)
    code = f"U+{ord(character):04X}"
    name = escape(unicodedata.name(character, code))
    return f'<i class="mark" title="{name}">{_NAMES.get(character, code)}</i>'


def attribute(text: object) -> Markup:
    """Return text for an attribute, a title or an SVG, in which elements are not allowed."""
    return Markup(escape(printable(str(text))))  # noqa: S704


def number_above_interval(
    value: float | None, ends: Sequence[float] | None = None, scale: float = 1
) -> Markup:
    """Return a number above its interval, "" for None; with a `scale` of 100, a share in percent."""
    if value is None:
        return Markup("")
    text = percent(value) if scale == 100 else number(value)
    if not ends:
        return Markup(text)  # noqa: S704  (digits)
    low, high = (number(scale * end, 3) for end in ends)
    return Markup(f"{text} <small>[{low}, {high}]</small>")  # noqa: S704


def flat(fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield nested fields as dotted keys, with values as YAML text; entries of lists without what is null."""
    for key, value in dotted_items(fields):
        content: object = value
        if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
            content = [{name: item for name, item in each.items() if item is not None} for each in value]
        yield key, as_yaml(content)


TEMPLATES = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=True,
    finalize=inert,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {
    "attribute": attribute,
    "counted": pluralize,
    "duration": duration,
    "capital": lambda sentence: sentence[:1].upper() + sentence[1:],
    # Names in backticks become code.
    "coded": lambda sentence: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(inert(sentence)))),  # noqa: S704
    "number": number,
    "percent": percent,
}


def page(
    template: str, title: str, scripts: Sequence[str] = (), *, reloads: bool = False, **content: Any
) -> str:
    """Return a page that loads nothing; its content security policy allows only its own styles and scripts.

    The page is complete without its scripts. `reloads`: the browser reads the file again every 30 seconds.
    """
    style = (_FOLDER / "page.css").read_text()
    script = "\n".join((_FOLDER / name).read_text() for name in scripts)
    digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in (style, script))
    html = TEMPLATES.get_template(template).render(
        title=title,
        reloads=reloads,
        style=Markup(style),  # noqa: S704  (own files)
        script=Markup(script),  # noqa: S704
        digests=[Markup(f"'sha256-{digest}'") for digest in digests],  # noqa: S704
        **content,
    )
    # A lone surrogate in a path cannot be encoded.
    return html.encode("utf-8", "replace").decode("utf-8")


def part(template: str, macro: str, *arguments: Any, **options: Any) -> Markup:
    """Return the HTML of a template's macro."""
    html: Markup = getattr(TEMPLATES.get_template(template).module, macro)(*arguments, **options)
    return html
