"""Escaped texts: a mark replaces each control token that data spell.

In an escaped text every control token left was written by the chat template or by this program. Only escaped
texts are encoded; a text that spells no control token is equal to its escaped form.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from dpo_dist.data.tokenization.chat_template import THOUGHT_TAGS, any_of

# A Unicode noncharacter, never part of interchanged text: it delimits marks.
RESERVED_CHARACTER = "\ufdd0"
RESERVED = re.compile(RESERVED_CHARACTER)

_LITERAL = re.compile(f"{RESERVED_CHARACTER}literal(\\d+){RESERVED_CHARACTER}")
_ESCAPED_CHARACTER = "\\ufdd0"
_BEFORE = f"{RESERVED_CHARACTER}before{RESERVED_CHARACTER}"
_AFTER = f"{RESERVED_CHARACTER}after{RESERVED_CHARACTER}"


class Marks:
    """The control tokens of a tokenizer and its chat template; marks in their place.

    Attributes:
        tokens: every control token, sorted; its index is the number in its mark.
        in_text: pattern of the tokens that are marked in any text.
        in_response: those that are marked in an assistant turn, where the model itself writes the tags of
            thoughts and of tool calls.
        anywhere: pattern of all of them, marked in all other turns, in tools and in arguments.
        token_or_mark: pattern of any control token, or of the mark of one.
    """

    def __init__(self, special: Collection[str], written_by_template: Collection[str]):
        """Args: special tokens and tokens around turns; further added tokens that the template writes."""
        self.tokens = sorted({*special, *written_by_template})
        self._numbers = {token: number for number, token in enumerate(self.tokens)}
        self.in_text = any_of(special)
        self.in_response = any_of(set(special) - set(THOUGHT_TAGS))
        self.anywhere = any_of(self.tokens)
        token = self.anywhere.pattern
        self.token_or_mark = re.compile(f"{_LITERAL.pattern}|{token}")
        self._in_place = re.compile(f"{_BEFORE}({token})|({token}){_AFTER}")

    def escape(self, text: str) -> str:
        """Return a text with a mark in place of each special token or token around turns."""
        return self.in_text.sub(self._mark, text)

    def replaced(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Return a value with each token that matches `pattern` replaced by its mark."""
        return _mapped(value, partial(pattern.sub, self._mark))

    def in_place(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Return a value with a mark beside each token, so that a template still finds it in the text.

        The mark is after a token at the start of a text and before any other one.
        """
        return _mapped(value, partial(pattern.sub, _beside))

    def settle(self, rendered: str) -> str:
        """Return the output of a template for marked values with marks only in place of tokens."""
        # Some templates write tools by `tojson` in ASCII or as Python would.
        rendered = rendered.replace(_ESCAPED_CHARACTER, RESERVED_CHARACTER)
        return self._in_place.sub(lambda found: self._mark_of(found.group(1) or found.group(2)), rendered)

    def spell(self, escaped: str) -> str:
        """Return the text that an escaped text spells."""
        return _LITERAL.sub(self._literal, escaped)

    def _mark(self, found: re.Match[str]) -> str:
        return self._mark_of(found.group())

    def _mark_of(self, token: str) -> str:
        return f"{RESERVED_CHARACTER}literal{self._numbers[token]}{RESERVED_CHARACTER}"

    def _literal(self, found: re.Match[str]) -> str:
        return self.tokens[int(found.group(1))]


def any_text(value: Any, pattern: re.Pattern[str]) -> bool:
    """Return whether a text of a nested value, or a key of it, matches `pattern`."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(any_text(part, pattern) for item in value.items() for part in item)
    return isinstance(value, list | tuple) and any(any_text(part, pattern) for part in value)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(name, change): _mapped(part, change) for name, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list | tuple) else value


def _beside(found: re.Match[str]) -> str:
    token, before = found.group(), found.string[: found.start()]
    return _BEFORE + token if before.strip() else token + _AFTER
