"""Words of a text that another text lacks, by their longest common subsequence."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dpo_dist.generation.words import WORD

Span = tuple[int, int]
"""First index and end of a passage, in characters or words."""


@dataclass(frozen=True)
class Difference:
    """The words of a text that another text lacks.

    Attributes:
        spans: passages of such words, in characters, in order; white space between two of them is in one.
        new: number of such words.
        words: number of all words of the text.
        similarity: twice the common words over the words of both texts; 1 for two texts without words.
    """

    spans: tuple[Span, ...]
    new: int
    words: int
    similarity: float


def difference(text: str, other: str) -> Difference:
    """Return the words of `text` that `other` lacks. White space is not compared.

    A few common words among many different ones count as different: their order agrees by chance.

    Args:
        text: its words get the spans.
        other: the text that it is compared with. Time and memory grow with the product of both numbers of
            words, divided by 64.
    """
    found, others = list(WORD.finditer(text)), WORD.findall(other)
    words = [each.group() for each in found]
    common = _without_chance(_common_runs(words, others), words, len(others))
    kept = sum(stop - start for start, stop in common)
    edges = [(0, 0), *common, (len(words), len(words))]
    spans = [
        (found[stop].start(), found[start - 1].end())
        for (_, stop), (start, _) in pairwise(edges)
        if start > stop
    ]
    total = len(words) + len(others)
    return Difference(tuple(spans), len(words) - kept, len(words), 2 * kept / total if total else 1.0)


def _without_chance(runs: Sequence[tuple[Span, Span]], words: Sequence[str], others: int) -> list[Span]:
    """Return the passages of `words` that are common, without short ones between long changes."""
    kept: list[Span] = []
    last = (0, 0)
    bounds = [*runs, ((len(words), len(words)), (others, others))]
    for ((start, stop), (at, end)), ((next_start, _), (next_at, _)) in pairwise(bounds):
        before = max(start - last[0], at - last[1])
        after = max(next_start - stop, next_at - end)
        has_letters = any(word[0].isalnum() for word in words[start:stop])
        if min(before, after) < (2 * (stop - start) if has_letters else 1):
            kept.append((start, stop))
            last = (stop, end)
    return kept


def _common_runs(words: Sequence[str], others: Sequence[str]) -> list[tuple[Span, Span]]:
    """Return the passages of a longest common subsequence: where they are in `words` and in `others`."""
    runs: list[tuple[Span, Span]] = []
    for index, at in _common_words(words, others):
        if runs and runs[-1][0][1] == index and runs[-1][1][1] == at:
            (start, _), (first, _) = runs.pop()
            runs.append(((start, index + 1), (first, at + 1)))
        else:
            runs.append(((index, index + 1), (at, at + 1)))
    return runs


def _common_words(words: Sequence[str], others: Sequence[str]) -> Iterator[Span]:
    """Yield the indices of equal words of a longest common subsequence.

    Bit-parallel (Hyyro 2004, "Bit-parallel LCS-length computation revisited"): a row of the dynamic programme
    is one integer, so that words that repeat cost no more than others.
    """
    shortest = min(len(words), len(others))
    head = next((at for at in range(shortest) if words[at] != others[at]), shortest)
    rest = shortest - head
    tail = next((at for at in range(rest) if words[-1 - at] != others[-1 - at]), rest)
    yield from ((at, at) for at in range(head))
    middle, other = words[head : len(words) - tail], others[head : len(others) - tail]
    yield from ((head + index, head + at) for index, at in _aligned(middle, other))
    yield from ((len(words) - at, len(others) - at) for at in range(tail, 0, -1))


def _aligned(words: Sequence[str], others: Sequence[str]) -> list[Span]:
    positions: defaultdict[str, int] = defaultdict(int)
    for index, word in enumerate(words):
        positions[word] |= 1 << index
    full = (1 << len(words)) - 1
    row, rows = full, []
    for word in others:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
        rows.append(row)
    found = []
    index, at = len(words), len(others)
    while index and at:
        bit = 1 << (index - 1)
        if rows[at - 1] & bit:
            index -= 1
            continue
        at -= 1
        if at and not rows[at - 1] & bit:
            continue
        index -= 1
        found.append((index, at))
    return found[::-1]
