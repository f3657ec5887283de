"""Facts about generated responses (length, end, repetition); their means as metrics."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import regex

# In scripts without spaces each letter, with its marks, counts as a word (\X is a grapheme).
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"[[\w\p{{M}}]--[{_UNSPACED}]]+(?:['\u2019]\w+)*|(?!\s)\X", regex.VERSION1)
"""Matches a word with its marks and apostrophes, or one other letter or sign that is not white space."""


_BASE = 0x9E3779B97F4A7C15
_LONGEST_WORD = 40
"""Most letters of a word; a longer one is a loop without spaces, an address or code."""


@dataclass(frozen=True)
class TextFacts:
    """Facts about one response; each field has the name of the metric that is its mean."""

    length: int  # in tokens, without the ending token
    finished: bool  # ended by itself
    distinct_3: float | None
    """Share of distinct ones among the trigrams of words (Li et al. 2016, arXiv 1510.03055)."""
    longest_repeat: float
    """Share of the words in the longest passage that occurs twice, which may overlap; near 1 if the response
    repeats one phrase to the end."""
    empty: bool


def text_facts(text: str, tokens: int, is_finished: bool) -> TextFacts:
    """Return the facts about a response."""
    words = list[str]()
    for word in WORD.findall(text.casefold()):
        # A word that is too long is split into letters, so that its repetitions count.
        words += word if len(word) > _LONGEST_WORD else (word,)
    grams = list(zip(words, words[1:], words[2:], strict=False))
    distinct = len(set(grams)) / len(grams) if grams else None
    return TextFacts(
        length=tokens,
        finished=is_finished,
        distinct_3=distinct,
        longest_repeat=longest_repeat(words) / max(len(words), 1),
        empty=not text.strip(),
    )


def longest_repeat(words: Sequence[str]) -> int:
    """Return the number of words in the longest passage that occurs twice, overlaps allowed."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers) + 1) for word in words], dtype=np.uint64)
    # A rolling hash: a polynomial of the word ids modulo 2^64; its base is odd: multiplying loses no bits.
    powers = np.cumprod(np.full(len(words) + 1, _BASE, dtype=np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(ids * powers[:-1])])

    def is_unique(length: int) -> bool:
        passages = (sums[length:] - sums[:-length]) * powers[::-1][: len(sums) - length]
        return len(np.unique(passages)) == len(passages)

    return bisect.bisect_left(range(1, len(words)), True, key=is_unique)


def sample_metrics(facts: Sequence[TextFacts]) -> dict[str, float]:
    """Return the mean of each fact that some response has."""
    metrics = {}
    for field in fields(TextFacts):
        column = [getattr(each, field.name) for each in facts]
        known = [value for value in column if value is not None]
        if known:
            metrics[field.name] = sum(known) / len(known)
    return metrics
