"""Render blocks as a page of one file; text of data stays inert."""

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import as_yaml
from dpo_dist.foundation.types import dotted_items
from dpo_dist.tools.pages.blocks import Chart, Choices, Folded, Heading, PageBlock

_FOLDER = Path(__file__).parent
_UPLOT = _FOLDER / "uplot"
_PLAIN = "\n\t "
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
# Letters and marks that draw nothing (fillers, the grapheme joiner), and the replacement character.
_OTHERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufffd")
_NAMES = {"\r": "CR", "\0": "NUL", "\x1b": "ESC"}


def inert(value: object) -> Markup:
    """Return a value as HTML; text is escaped, and invisible and bidirectional characters become marks.

    Every expression of the template passes through this function, so that text of data cannot act on a page.
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


def _coded(text: object) -> Markup:
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(inert(text))))  # noqa: S704  (inert before)


def _html(block: PageBlock) -> Markup:
    """Return the HTML of a block, by the macro with the name of its class."""
    html: Markup = getattr(_BLOCKS, type(block).__name__.lower())(block)
    return html


def flat(fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield nested fields as dotted keys, with values as YAML text; entries of lists without what is null."""
    for key, value in dotted_items(fields):
        content: object = value
        if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
            content = [{name: item for name, item in each.items() if item is not None} for each in value]
        yield key, as_yaml(content)


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=True,
    finalize=inert,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"html": _html, "coded": _coded, "printable": printable}
_BLOCKS = _ENVIRONMENT.get_template("blocks.jinja").module
_PAGE = _ENVIRONMENT.get_template("page.jinja")


def page(
    title: str, blocks: Sequence[PageBlock], badges: Sequence[tuple[str, str]] = (), *, reloads: bool = False
) -> str:
    """Return a page that loads nothing; its content security policy allows only its own style and scripts.

    `badges`: level and text, beside the title. `reloads`: the browser reads the file again every 30 seconds.
    """
    all_blocks = list(_unfolded(blocks))
    scripts = [(_FOLDER / "page.js").read_text()]
    styles = (_FOLDER / "page.css").read_text()
    if any(isinstance(block, Chart) for block in all_blocks):
        scripts.insert(0, (_UPLOT / "uPlot.iife.min.js").read_text())
        styles += (_UPLOT / "uPlot.min.css").read_text()
    html = _PAGE.render(
        title=title,
        badges=badges,
        reloads=reloads,
        style=Markup(styles),  # noqa: S704  (own files)
        style_digest=_digest(styles),
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        script_digests=list(map(_digest, scripts)),
        form_action="'self'" if any(isinstance(block, Choices) for block in blocks) else "'none'",
        sections=[block.text for block in blocks if isinstance(block, Heading)],
        blocks=blocks,
    )
    # A lone surrogate in a path cannot be encoded.
    return html.encode("utf-8", "replace").decode("utf-8")


def _unfolded(blocks: Sequence[PageBlock]) -> Iterator[PageBlock]:
    for block in blocks:
        yield block
        if isinstance(block, Folded):
            yield from _unfolded(block.blocks)


def _digest(text: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'")  # noqa: S704  (letters and digits)
