"""Side-features of a response: facts about its form that can reveal which side it is."""

import math
import re
from collections.abc import Callable, Mapping

from dpo_dist.generation.text_facts import is_refusal
from dpo_dist.insight.doctor.texts import names_model, words_and_marks

_HEAD_CHARACTERS = 400
_EDGE_CHARACTERS = 100
_SPACES, _LINE_ENDS = (" ", "\u3000", "\u00a0"), ("\n", "\r")
_ODD = "[\ufffd\u200b\u2060\ufeff\u00a0\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
Feature = Callable[[str, str], float]
"""Of a response, and of the response without white space around it."""


def _has(pattern: str) -> Feature:
    found = re.compile(pattern, re.MULTILINE)
    return lambda _, bare: found.search(bare) is not None


def _share(characters: str) -> Feature:
    return lambda _, bare: sum(map(bare.count, characters)) / max(len(bare), 1)


def _share_of_head(pattern: str) -> Feature:
    found = re.compile(pattern)
    return lambda _, bare: len(found.findall(bare[:_HEAD_CHARACTERS])) / max(len(bare[:_HEAD_CHARACTERS]), 1)


def _share_outside_ascii(pattern: str) -> Feature:
    found = re.compile(pattern)
    return lambda _, bare: 0.0 if bare.isascii() else len(found.findall(bare)) / len(bare)


# All but the length are yes or no, or shares of the characters, so that none measures the length.
_FEATURES: Mapping[str, Mapping[str, Feature]] = {
    "length": {"characters": lambda _, bare: math.log1p(len(bare))},
    "white space": {
        "leading space": lambda text, _: text.startswith(_SPACES),
        "leading newline": lambda text, _: text.startswith(_LINE_ENDS),
        "trailing space": lambda text, _: text.endswith(_SPACES),
        "trailing newline": lambda text, _: text.endswith(_LINE_ENDS),
        "carriage return": lambda text, _: "\r" in text,
        "two spaces": lambda _, bare: "  " in bare,
        "tabs": lambda _, bare: "\t" in bare,
    },
    "punctuation": {
        "ends with a full stop": lambda _, bare: bare.endswith((".", "\u3002")),
        "ends with another mark": lambda _, bare: bare.endswith(tuple('!?:)"\uff01\uff1f')),
        "starts with a small letter": lambda _, bare: bare[:1].islower(),
        "share of capitals": _share_of_head("[A-Z]"),
        "share of commas": _share(",\uff0c"),
        "share of exclamation marks": _share("!"),
        "share of question marks": _share("?"),
        "share of quotation marks": _share("\"'\u2019"),
        "share of typographic marks": _share("\u2014\u2013\u2018\u2019\u201c\u201d\u2026"),
        "share of digits": _share_of_head("[0-9]"),
        "share of newlines": _share("\n"),
        "emoji": _has("[\u2600-\u27bf\U0001f300-\U0001faff]"),
    },
    "markdown": {
        "bold": lambda _, bare: "**" in bare,
        "bullets": _has(r"^[ \t]{0,16}[-*\u2022] "),
        "numbered list": _has(r"^[ \t]{0,16}\d{1,4}[.)] "),
        "headers": _has("^#{1,6} "),
        "code block": lambda _, bare: "```" in bare,
        "table": lambda _, bare: "\n|" in bare,
        "links": lambda _, bare: "](" in bare,
    },
    "language": {
        "share of other scripts": _share_outside_ascii("[\u0370-\u1fff\u3040-\ud7ff]"),
        "share outside ASCII": _share_outside_ascii("[^\x00-\x7f]"),
    },
    "model names": {"model name": lambda _, bare: names_model(bare)},
    "refusal": {"refusal": lambda _, bare: is_refusal(bare)},
    "odd characters": {"odd characters": lambda text, _: re.search(_ODD, text) is not None},
}
_FIRST = ("first word", "second word", "third word")
_LAST = ("last word", "last word but one", "last word but two")


def group_of(feature: str) -> str:
    """Return the group of a feature of `differences`."""
    found = (group for group, features in _FEATURES.items() if feature in features)
    return next(found, "last words" if feature.startswith("last word") else "first words")


def differences(chosen: str, rejected: str) -> dict[str, float]:
    """Return the features of the chosen response minus those of the rejected one, where they differ.

    A word at one of the three first or last places (`last word 'you'`) counts 1; words have their case.
    """
    first, second = _features(chosen), _features(rejected)
    found = {name: first.get(name, 0.0) - second.get(name, 0.0) for name in {**first, **second}}
    return {name: difference for name, difference in found.items() if difference}


def _features(response: str) -> dict[str, float]:
    bare = response.strip()
    found = {
        name: float(feature(response, bare))
        for features in _FEATURES.values()
        for name, feature in features.items()
    }
    starts = zip(_FIRST, words_and_marks(response[:_EDGE_CHARACTERS]), strict=False)
    ends = zip(_LAST, words_and_marks(response[-_EDGE_CHARACTERS:])[::-1], strict=False)
    return found | {f"{place} {word!r}": 1.0 for place, word in (*starts, *ends)}
