"""The tokens of a response that the loss counts: turns by role, without untrained parts."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data_schema import MARKER_GAP, UNTRAINED_PARTS
from dpo_dist.data.tokenization.chat_template import THOUGHT_TAGS
from dpo_dist.data.tokenization.turn_trace import Span

Mask = npt.NDArray[np.bool_]

_NOTHING = re.compile(r"(?!)")
# Of an opened marker and the white space after it, in characters.
_LONGEST_OPENING = 128


@dataclass(frozen=True)
class UntrainedParts:
    """`data.untrained`, compiled.

    Attributes:
        at_start: pattern of text at the start of a turn that the loss does not count.
        inside: patterns of such text anywhere in a turn.
        opened: patterns of text at the start of a turn whose generation prompt opened a thought or a
            marker, each with that opening.
    """

    at_start: re.Pattern[str]
    inside: tuple[re.Pattern[str], ...]
    opened: tuple[tuple[str, re.Pattern[str]], ...]

    def within(self, before: str, turn: str) -> Iterator[Span]:
        """Yield the untrained spans of a turn, given the text before it without white space at its end."""
        if found := self.at_start.match(turn):
            yield found.span()
        for opening, pattern in self.opened:
            if before.endswith(opening) and (found := pattern.match(turn)):
                yield found.span()
        for pattern in self.inside:
            yield from (found.span() for found in pattern.finditer(turn))


@lru_cache(maxsize=8)
def untrained_parts(names: tuple[str, ...], formatting: re.Pattern[str] | None) -> UntrainedParts:
    """Return the compiled `data.untrained`.

    Args:
        names: its entries.
        formatting: pattern of the tokens around turns, if they are untrained.
    """
    at_start, opened = _NOTHING, []
    inside = [] if formatting is None else [formatting]
    begin, end = map(re.escape, THOUGHT_TAGS)
    if "empty_thoughts" in names:
        at_start = re.compile(rf"\s*{begin}\s*{end}\s*")
        opened.append((THOUGHT_TAGS[0], re.compile(rf"\s*{end}\s*")))
    markers = [name.split(MARKER_GAP, 1) for name in names if name not in UNTRAINED_PARTS]
    for first, last in [THOUGHT_TAGS, *markers] if "thoughts" in names else markers:
        spaces = r"\s*" if (first, last) == THOUGHT_TAGS else ""
        until = rf".*?(?:{re.escape(last)}{spaces}|\Z)"
        inside.append(re.compile(re.escape(first) + until, re.DOTALL))
        opened.append((first, re.compile(until, re.DOTALL)))
    return UntrainedParts(at_start, tuple(inside), tuple(opened))


def counted_characters(
    before: str, text: str, turns: Sequence[Span], parts: UntrainedParts
) -> list[Span] | None:
    """Return the spans of a response that the loss counts; None if it counts the whole text.

    Args:
        before: the rendered prompt.
        text: the rendered response.
        turns: the spans of its turns that the loss counts.
        parts: untrained parts of these turns.
    """
    before = before[-_LONGEST_OPENING:]
    if len(turns) == 1 and turns[0] == (0, len(text)):
        untrained = _union(parts.within(before.rstrip(), text))
        return _rest(0, len(text), untrained) if untrained else None
    counted = []
    for start, end in turns:
        preceding = before + text[max(start - _LONGEST_OPENING, 0) : start]
        untrained = _union(parts.within(preceding.rstrip(), text[start:end]))
        counted += [(start + first, start + last) for first, last in _rest(0, end - start, untrained)]
    return counted


def token_mask(starts: Sequence[int], length: int, counted: Sequence[Span]) -> Mask:
    """Return whether the loss counts each token: whether it has a counted character.

    Args:
        starts: position of each token's first character, not falling.
        length: of the text, in characters.
        counted: spans of characters, ascending.
    """
    begins = np.array(starts, dtype=np.int64)
    # A character of several tokens (bytes) belongs to each of them.
    following = np.searchsorted(np.append(begins, length), begins, side="right")
    ends = np.append(begins, length)[np.minimum(following, len(begins))]
    mask = np.zeros(len(begins), dtype=np.bool_)
    for start, end in counted:
        mask |= (begins < end) & (ends > start)
    return mask


def _union(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _rest(start: int, end: int, untrained: Sequence[Span]) -> list[Span]:
    edges = [start, *(edge for span in untrained for edge in span), end]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]
