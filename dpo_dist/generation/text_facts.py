"""Facts of generated responses: length, end, repetition, language, refusal; their means as metrics."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import regex
from py3langid.langid import MODEL_FILE, LanguageIdentifier

# A letter of a script without spaces is a word of its own, with its marks (\X is a grapheme).
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"[[\w\p{{M}}]--[{_UNSPACED}]]+(?:['\u2019]\w+)*|(?!\s)\X", regex.VERSION1)
"""A word with its marks and apostrophes, or one sign that is neither a letter nor white space."""


# Shorter texts are often mistaken.
_MIN_CHARACTERS = 60
_MIN_WIDE_CHARACTERS = 12
_MIN_PROBABILITY = 0.95
# Written in the same characters; short texts are mistaken for each other.
_SAME = {"wuu": "zh", "yue": "zh"}


def language_of(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language; None if it is not clear."""
    bare = text.strip()
    wide = sum(character > "\u2e7f" for character in bare)
    if len(bare) < _MIN_CHARACTERS and wide < _MIN_WIDE_CHARACTERS:
        return None
    language, probability = _identifier().classify(bare)
    return _SAME.get(str(language), str(language)) if probability >= _MIN_PROBABILITY else None


def shares(languages: Sequence[str | None]) -> Mapping[str, float]:
    """Return the share of each language among those known, the largest first."""
    known = [language for language in languages if language is not None]
    return {language: count / len(known) for language, count in Counter(known).most_common()}


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


_FIRST_CHARACTERS = 200

# Somebody else speaks in a quotation.
_QUOTATION = re.compile('["\u201c\u300c][^"\u201d\u300d]*["\u201d\u300d]?')
_MANNER = (
    "(?: (?:really|simply|just|also|still|currently|unfortunately|honestly|directly|ethically"
    "|in good conscience))*"
)
_NOT = r"(?:can ?not|can\W?t|will not|won\W?t)"
_CANNOT = rf"{_NOT}(?:,? (?:and|or) {_NOT})?(?: be able to)?"
# A request is refused by these: "I can't believe it" and "I won't lie" refuse none.
_SERVE = (
    r"(?:assist|answer|comply|fulfil|support|participate|engage|respond|discuss|endorse|condone|promote"
    r"|encourage|facilitate|contribute|generate|create|produce|provide|offer|access|browse|disclose|reveal"
    r"|impersonate|pretend|predict|speculate|advise|explain|describe|teach|share|suggest|complete|write"
    r"|process|perform|carry out|translate|say that|recommend(?!.{0,40}\benough)"
    r"|help(?! (?:but|it\b|feeling|thinking|wondering|noticing|myself))|continue (?:this|with)"
    r"|give (?:you|out|any|advice|specific|instructions|medical|legal|financial)"
    r"|do (?:that|this|so)\b|make (?:that|this|up)\b)"
)
_DECLINE = "(?:respectfully |politely )*(?:decline|refuse)"
_OF_SPEAKER = (
    rf"{_MANNER} {_CANNOT}{_MANNER} {_SERVE}",
    rf"{_MANNER} {_CANNOT}[.!]",
    rf"(?:\W?m| am){_MANNER} (?:unable|not (?:able|allowed|permitted|willing|going|authori[sz]ed"
    rf"|programmed)) to{_MANNER} {_SERVE}",
    rf"(?:\W?m| am){_MANNER} not comfortable",
    rf"{_MANNER} (?:do not|don\W?t) (?:feel comfortable|want to {_SERVE})",
    rf"[^.,!?]{{0,20}} (?:must|have to|need to) {_DECLINE}\b",
    rf" (?:respectfully|politely) {_DECLINE}\b",
    rf" refuse to {_SERVE}",
    r"(?:\W?d| would) (?:rather not|prefer not to)\b",
)
# At most three: of more, a text that repeats "as a" could be divided in too many ways to try them all.
_AS_MODEL = r"(?:(?:but|however|as an? [\w ]{1,20}),? ){0,3}"
_ENGLISH = (
    rf"\bI(?:{'|'.join(_OF_SPEAKER)})",
    r"^\W{0,3}(?:(?:I(?:\W?m| am)(?: very| so| really| truly)? )?sorry|I apologi[sz]e|unfortunately)\W+"
    rf"{_AS_MODEL}(?:no\b|I (?:do not|don\W?t) have (?:access|the ability|enough information)"
    r"|(?:that|this|it)(?: is|\W?s| would be) (?:inappropriate|against|unethical|illegal))",
    r"^\W{0,3}no,? (?:I )?(?:will not|won\W?t|can ?not|can\W?t)\b",
    r"\bagainst my (?:guidelines|programming|principles|policy|policies|values)\b",
    r"\b(?:not|isn\W?t) something (?:that )?I(?: can|\W?m able to| am able to| will)\b",
)
_CANNOT_ZH = (
    "(?:\u4e0d\u80fd|\u4e0d\u4f1a|\u4e0d\u4fbf|\u4e0d\u53ef\u4ee5|"
    "\u65e0\u6cd5|\u62d2\u7edd|\u6ca1\u6709?\u529e\u6cd5)"
)
_CHINESE = (
    # An apology, not "sorry to hear", with a clause of inability.
    f"(?:\u62b1\u6b49|\u5bf9\u4e0d\u8d77|\u4e0d\u597d\u610f\u601d|\u9057\u61be)(?!\u542c\u5230|\u5f97\u77e5)[^\u3002\uff01\uff1f\n]{{0,20}}?{_CANNOT_ZH}",
    # I cannot, or refuse to, serve the request.
    f"\u6211{_CANNOT_ZH}[^\uff0c\u3002\uff01\uff1f\n]{{0,6}}?"
    "(?:\u63d0\u4f9b|\u56de\u7b54|\u6ee1\u8db3|\u534f\u52a9|\u5b8c\u6210|\u8ba8\u8bba|\u751f\u6210|\u900f\u9732|\u53c2\u4e0e|\u652f\u6301|\u6267\u884c|\u5e2e|\u5199)",
)
_REFUSAL = re.compile("|".join((*_ENGLISH, *_CHINESE)), re.IGNORECASE)


@lru_cache(maxsize=8)  # a response is asked about twice
def is_refusal(response: str) -> bool:
    """Return whether a response starts like a refusal (English and Chinese phrases)."""
    return _REFUSAL.search(_QUOTATION.sub("", response[:_FIRST_CHARACTERS])) is not None


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
