"""Text of data as inert HTML, without markup; origins of records in few words."""

import unicodedata
from collections.abc import Sequence
from html import escape

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
