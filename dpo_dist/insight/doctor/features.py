"""Side-features of a response: facts about its form that can reveal which side it is."""

import re

import numpy as np
import numpy.typing as npt

from dpo_dist.generation.text_facts import is_refusal
from dpo_dist.insight.doctor.texts import names_model, words_and_marks

EDGE_WORDS = 3
_HEAD_CHARACTERS = 400
_EDGE_CHARACTERS = 100

_CODE = re.compile("```")
_BULLET = re.compile(r"^[ \t]{0,16}[-*\u2022] ", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]{0,16}\d{1,4}[.)] ", re.MULTILINE)
_HEADER = re.compile(r"^#{1,6} ", re.MULTILINE)
_EMOJI = re.compile("[\u2600-\u27bf\U0001f300-\U0001faff]")
_ODD = re.compile("[\ufffd\u200b\u2060\ufeff\u00a0\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CAPITAL, _DIGIT, _OUTSIDE_ASCII = re.compile("[A-Z]"), re.compile("[0-9]"), re.compile("[^\x00-\x7f]")
_NON_LATIN = re.compile("[\u0370-\u1fff\u3040-\ud7ff]")

GROUPS: dict[str, tuple[str, ...]] = {
    "length": ("characters",),
    "white space": (
        "leading space",
        "leading newline",
        "trailing space",
        "trailing newline",
        "carriage return",
        "two spaces",
        "tabs",
    ),
    "punctuation": (
        "ends with a full stop",
        "ends with another mark",
        "starts with a small letter",
        "share of capitals",
        "share of commas",
        "share of exclamation marks",
        "share of question marks",
        "share of quotation marks",
        "share of typographic marks",
        "share of digits",
        "share of newlines",
        "emoji",
    ),
    "markdown": ("bold", "bullets", "numbered list", "headers", "code block", "table", "links"),
    "language": ("share of other scripts", "share outside ASCII"),
    "model names": ("model name",),
    "refusal": ("refusal",),
    "odd characters": ("odd characters",),
}
"""The features by group, in the order of `side_features`."""

NAMES = tuple(name for names in GROUPS.values() for name in names)


def side_features(response: str) -> npt.NDArray[np.float32]:
    """Return the features of a response in the order of `NAMES`, float32 [features].

    All but the length are yes or no, or shares of the characters, so that none measures the length.
    """
    bare = response.strip()
    size = max(len(bare), 1)
    start, end = response[: len(response) - len(response.lstrip())], response[len(response.rstrip()) :]
    quotation = bare.count('"') + bare.count("'") + bare.count("\u2019")
    typographic = sum(map(bare.count, "\u2014\u2013\u2018\u2019\u201c\u201d\u2026"))
    head = bare[:_HEAD_CHARACTERS]
    capitals = len(_CAPITAL.findall(head)) / max(len(head), 1)
    digits = len(_DIGIT.findall(head)) / max(len(head), 1)
    outside = 0.0 if bare.isascii() else len(_OUTSIDE_ASCII.findall(bare)) / size
    scripts = 0.0 if bare.isascii() else len(_NON_LATIN.findall(bare)) / size
    values = (
        np.log1p(len(bare)),
        start[:1] in (" ", "\u3000", "\u00a0"),
        start[:1] in ("\n", "\r"),
        end[-1:] in (" ", "\u3000", "\u00a0"),
        end[-1:] in ("\n", "\r"),
        "\r" in response,
        "  " in bare,
        "\t" in bare,
        bare[-1:] in (".", "\u3002"),
        bare[-1:] in ("!", "?", ":", ")", '"', "\uff01", "\uff1f"),
        bare[:1].islower(),
        capitals,
        (bare.count(",") + bare.count("\uff0c")) / size,
        bare.count("!") / size,
        bare.count("?") / size,
        quotation / size,
        typographic / size,
        digits,
        bare.count("\n") / size,
        _EMOJI.search(bare) is not None,
        "**" in bare,
        _BULLET.search(bare) is not None,
        _NUMBERED.search(bare) is not None,
        _HEADER.search(bare) is not None,
        _CODE.search(bare) is not None,
        "\n|" in bare,
        "](" in bare,
        scripts,
        outside,
        names_model(bare),
        is_refusal(bare),
        _ODD.search(response) is not None,
    )
    return np.array(values, dtype=np.float32)


def edge_words(response: str) -> tuple[str, ...]:
    """Return the first and the last words of a response with their position, for a bag of words.

    `first 1=The` is the first word; the last ones are counted from the end. Words have their case.
    """
    first = words_and_marks(response[:_EDGE_CHARACTERS])[:EDGE_WORDS]
    last = words_and_marks(response[-_EDGE_CHARACTERS:])[::-1][:EDGE_WORDS]
    return (
        *(f"first {number}={word}" for number, word in enumerate(first, start=1)),
        *(f"last {number}={word}" for number, word in enumerate(last, start=1)),
    )
