"""Facts about generated responses (length, end, repetition, language, refusal); their means as metrics."""

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import regex

# In scripts without spaces each letter, with its marks, counts as a word (\X is a grapheme).
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"[[\w\p{{M}}]--[{_UNSPACED}]]+(?:['\u2019]\w+)*|(?!\s)\X", regex.VERSION1)
"""Matches a word with its marks and apostrophes, or one other letter or sign that is not white space."""


# The language of shorter texts is often guessed wrong.
_MIN_CHARACTERS = 60
_MIN_WIDE_CHARACTERS = 12
_MIN_PROBABILITY = 0.95
# Chinese languages with the same characters: in short texts py3langid often confuses them.
_SAME = {"wuu": "zh", "yue": "zh"}


def detect_language(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language; None if it is not clear, or py3langid is missing."""
    bare = text.strip()
    wide = sum(character > "\u2e7f" for character in bare)
    if len(bare) < _MIN_CHARACTERS and wide < _MIN_WIDE_CHARACTERS:
        return None
    identifier = language_identifier()
    if identifier is None:
        return None
    language, probability = identifier.classify(bare)
    return _SAME.get(str(language), str(language)) if probability >= _MIN_PROBABILITY else None


@cache
def language_identifier() -> Any | None:
    """Return py3langid's identifier; None without the package, which a node that only trains may lack."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415  (optional)
    except ModuleNotFoundError:
        return None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


_FIRST_CHARACTERS = 200
# A refusal in a quotation is somebody else's.
_QUOTATION = re.compile('["\u201c\u300c][^"\u201d\u300d]*["\u201d\u300d]?')
_MANNER = re.compile(
    " (?:really|simply|just|also|still|currently|unfortunately|honestly|directly|ethically"
    r"|respectfully|politely|in good conscience)\b",
    re.IGNORECASE,
)
_NOT = r"(?:can ?not|can\W?t|will not|won\W?t)"
# Only these verbs refuse a request: "I can't believe it" and "I won't lie" do not.
_SERVE = (
    "(?:access|advise|answer|assist|browse|comply|complete|condone|contribute|create|disclose|discuss"
    "|encourage|endorse|engage|explain|facilitate|fulfil|generate|impersonate|offer|participate|perform"
    "|predict|process|produce|promote|provide|respond|reveal|share|speculate|suggest|support|teach"
    r"|translate|write|help(?! (?:but|it\b|feeling|thinking|wondering|noticing|myself))"
    r"|give (?:you|out|any|advice|medical|legal|financial)|do (?:that|this|so)\b)"
)
_CANNOT_ZH = "(?:不能|不会|不便|不可以|无法|拒绝|没有?办法)"
_REFUSAL = re.compile(
    "|".join(
        (
            rf"\bI {_NOT}(?: (?:and|or) {_NOT})?(?: be able to)?(?: {_SERVE}|[.!])",
            r"\bI(?:\W?m| am) (?:unable|not (?:able|allowed|permitted|willing|going|authorized|programmed))"
            rf" to {_SERVE}",
            r"\bI(?:\W?m| am) not comfortable",
            rf"\bI (?:do not|don\W?t) (?:feel comfortable|want to {_SERVE})",
            r"\bI[^.,!?]{0,20} (?:must|have to|need to) (?:decline|refuse)\b",
            r"\bI (?:decline|refuse to)\b",
            r"\bI(?:\W?d| would) (?:rather not|prefer not to)\b",
            r"^\W{0,3}(?:I(?:\W?m| am) |I am so )?sorry\W+(?:but )?(?:no\b|I (?:do not|don\W?t) have"
            r"|(?:that|this|it)(?: is|\W?s| would be) (?:inappropriate|against|unethical|illegal))",
            rf"^\W{{0,3}}no,? (?:I )?{_NOT}\b",
            r"\bagainst my (?:guidelines|programming|principles|policy|policies|values)\b",
            r"\b(?:not|isn\W?t) something (?:that )?I(?:\W?m| am| can| will)\b",
            # Chinese: an apology (not "sorry to hear") with "cannot"; or "I cannot" with such a verb.
            f"(?:抱歉|对不起|不好意思|遗憾)(?!听到|得知)[^\u3002\uff01\uff1f\n]{{0,20}}?{_CANNOT_ZH}",
            f"我{_CANNOT_ZH}[^\uff0c\u3002\uff01\uff1f\n]{{0,6}}?(?:提供|回答|满足|协助|完成|讨论|生成|透露|参与|支持|执行|帮|写)",
        )
    ),
    re.IGNORECASE,
)


@lru_cache(maxsize=8)  # called twice for each response
def is_refusal(response: str) -> bool:
    """Return whether a response starts like a refusal (English and Chinese phrases)."""
    start = _QUOTATION.sub("", response[:_FIRST_CHARACTERS])
    return _REFUSAL.search(_MANNER.sub("", start)) is not None


_BASE = 0x9E3779B97F4A7C15
_LONGEST_WORD = 40
"""Most letters of a word; a longer one is a loop without spaces, an address or code."""


@dataclass(frozen=True)
class TextFacts:
    """Facts about one response; each field but the last has the name of the metric that is its mean."""

    length: int  # in tokens, without the ending token
    finished: bool  # ended by itself
    refusals: bool
    distinct_3: float | None
    """Share of distinct ones among the trigrams of words (Li et al. 2016, arXiv 1510.03055)."""
    longest_repeat: float
    """Share of the words in the longest passage that occurs twice, which may overlap; near 1 if the response
    repeats one phrase to the end."""
    empty: bool
    language: str | None  # ISO 639-1; None if it is not clear


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
        refusals=is_refusal(text),
        distinct_3=distinct,
        longest_repeat=longest_repeat(words) / max(len(words), 1),
        empty=not text.strip(),
        language=detect_language(text),
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


_SAMPLE_METRICS = [
    "length",
    "finished",
    "distinct_3",
    "longest_repeat",
    "language_changed",
    "refusals",
    "empty",
]


def sample_metrics(facts: Sequence[TextFacts], expected: Sequence[str | None]) -> dict[str, float]:
    """Return the mean of each fact that some response has. `expected`: languages of the chosen responses."""
    changed = []
    for response, language in zip(facts, expected, strict=True):
        if response.language is not None and language is not None:
            changed.append(response.language != language)
    metrics = {}
    for name in _SAMPLE_METRICS:
        column = changed if name == "language_changed" else [getattr(response, name) for response in facts]
        values = [value for value in column if value is not None]
        if values:
            metrics[name] = sum(values) / len(values)
    return metrics
