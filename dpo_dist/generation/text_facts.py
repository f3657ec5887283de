"""Facts of generated responses: length, end, repetition, language, refusal; their means as metrics."""

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from dpo_dist.generation.languages import language_of
from dpo_dist.generation.refusals import is_refusal
from dpo_dist.generation.words import WORD

_GRAM = 3
_LONGEST_WORD = 40
"""Letters of a word; a longer one is no word but a loop without spaces, an address or a code."""
# The time of each grows with the length of a text, also of one that repeats a line end or a bracket.
_LIST_ITEM = re.compile(r"^[^\S\n]*([-*+\u2022]|\d{1,3}[.)])\s+\S", re.MULTILINE)
_MARKDOWN = re.compile(r"^#{1,6} \S|\*\*\S|^```|^\|.*\|\s*$|`[^`\n]+`|\[[^\[\]\n]+\]\(", re.MULTILINE)


@dataclass(frozen=True)
class TextFacts:
    """Facts of one response.

    Attributes:
        tokens: generated, without the one that ended it.
        is_finished: whether it ended by itself.
        distinct_3: share of different ones among its runs of three words (Li et al. 2016, arXiv 1510.03055);
            None for fewer words.
        longest_repeat: share of its words in its longest passage that occurs twice, overlapping; near 1 if it
            repeats one phrase to the end.
        is_empty: whether it has no text.
        is_refusal: whether it starts like a refusal.
        language: ISO 639-1 code; None if it is not clear.
        words: with letters or digits; a letter of a script without spaces is one, with its marks.
        has_list: whether two of its lines are items of a list.
        has_markdown: whether it has a heading, bold text, code, a table or a link of Markdown.
    """

    tokens: int
    is_finished: bool
    distinct_3: float | None
    longest_repeat: float
    is_empty: bool
    is_refusal: bool
    language: str | None
    words: int
    has_list: bool
    has_markdown: bool


def text_facts(text: str, tokens: int, is_finished: bool) -> TextFacts:
    """Return the facts of a response."""
    whole = WORD.findall(text.casefold())
    words = [part for word in whole for part in _parts(word)]
    grams = list(zip(*(words[start:] for start in range(_GRAM)), strict=False))
    return TextFacts(
        tokens=tokens,
        is_finished=is_finished,
        distinct_3=len(set(grams)) / len(grams) if grams else None,
        longest_repeat=longest_repeat(words) / len(words) if words else 0.0,
        is_empty=not text.strip(),
        is_refusal=is_refusal(text),
        language=language_of(text),
        words=sum(any(map(str.isalnum, word)) for word in whole),
        has_list=len(_LIST_ITEM.findall(text)) > 1,
        has_markdown=_MARKDOWN.search(text) is not None,
    )


def _parts(word: str) -> Sequence[str]:
    """Return a word, or the letters of one that is too long, in which repetition is to be seen."""
    return word if len(word) > _LONGEST_WORD else (word,)


def longest_repeat(words: Sequence[str]) -> int:
    """Return the most consecutive words that occur at two places, which may overlap; 0 if none do.

    Time grows with n log n: passages of 1, 2, 4, ... words get numbers, equal ones the same (Karp, Miller and
    Rosenberg 1972, doi 10.1145/800152.804905).
    """
    numbers, length = _numbered(words), 1
    if not _has_equal(numbers):
        return 0
    while _has_equal(doubled := _numbered(zip(numbers, numbers[length:], strict=False))):
        numbers, length = doubled, 2 * length
    # A passage that occurs twice has shorter ones that do: bisect its length.
    low, high = length, 2 * length - 1
    while low < high:
        middle = (low + high + 1) // 2
        # Two numbered passages, which may overlap, are one of `middle` words.
        if _has_equal(list(zip(numbers, numbers[middle - length :], strict=False))):
            low = middle
        else:
            high = middle - 1
    return low


def _numbered(passages: Iterable[Hashable]) -> list[int]:
    """Return a number for each passage, the same for equal ones."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(passage, len(numbers)) for passage in passages]


def _has_equal(passages: Sequence[Hashable]) -> bool:
    return len(set(passages)) < len(passages)


def sample_metrics(facts: Sequence[TextFacts], expected: Sequence[str | None]) -> dict[str, float]:
    """Return the means of facts by name; without a measurement a name is absent.

    Args:
        facts: of responses.
        expected: language in which each response was expected; None: not known.
    """
    languages = [
        (found.language, language)
        for found, language in zip(facts, expected, strict=True)
        if found.language is not None and language is not None
    ]
    measured: dict[str, list[float]] = {
        "length": _numbers(found.tokens for found in facts),
        "finished": _numbers(found.is_finished for found in facts),
        "distinct_3": _numbers(found.distinct_3 for found in facts),
        "longest_repeat": _numbers(found.longest_repeat for found in facts),
        "language_changed": _numbers(found != language for found, language in languages),
        "refusals": _numbers(found.is_refusal for found in facts),
        "empty": _numbers(found.is_empty for found in facts),
    }
    return {name: sum(values) / len(values) for name, values in measured.items() if values}


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None]
