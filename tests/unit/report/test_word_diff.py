"""Words that differ: a longest common subsequence, without common words by chance, in any script."""

import random
from itertools import pairwise

import pytest

from dpo_dist.insight.pages.side_by_side import _common_words, difference


def marked(text: str, other: str) -> list[str]:
    return [text[start:stop] for start, stop in difference(text, other).spans]


@pytest.mark.parametrize(
    ("text", "other", "passages"),
    [
        ("A cat stood on a mat", "The cat sat on the mat", ["A", "stood", "a"]),
        ("a b c", "a b c", []),
        ("a b", "a b c d", []),
        ("new start, same end", "same end", ["new start,"]),
        ("", "a", []),
        ("a", "", ["a"]),
        ("don't", "don", ["don't"]),
        ("a\n\n    b", "a b", []),
        # Words of scripts without spaces are compared by character.
        ("我们今天去北京大学", "我们昨天去清华大学", ["今", "北京"]),
        ("ありがとうございます", "ありがとうございました", ["す"]),
        # A vowel sign stays with its letter, a family of emoji is one word.
        ("हिन्दी में", "हिन्दू में", ["हिन्दी"]),
        ("a 👩\u200d👩\u200d👧", "a 👩\u200d👩\u200d👦", ["👩\u200d👩\u200d👧"]),
        ("שלום עולם", "שלום לך", ["עולם"]),
    ],
)
def test_words_that_the_other_lacks_are_marked(text: str, other: str, passages: list[str]) -> None:
    assert marked(text, other) == passages


def test_common_words_by_chance_are_not_common() -> None:
    assert marked("one, two, three", "four, five, six") == ["one, two, three"]
    long_change = "alpha beta gamma of delta epsilon zeta"
    assert marked(long_change, "uno dos tres of cuatro cinco seis") == [long_change]
    assert marked("alpha the cat sat beta", "uno the cat sat dos") == ["alpha", "beta"]


def test_numbers_of_a_difference() -> None:
    found = difference("a b x y", "a b c")
    assert (found.new, found.words) == (2, 4)
    assert found.similarity == pytest.approx(4 / 7)
    assert difference("", "").similarity == 1
    assert difference("a", "").similarity == 0


@pytest.mark.parametrize("seed", range(200))
def test_the_common_words_are_a_longest_common_subsequence(seed: int) -> None:
    source = random.Random(seed)
    words = source.choices("abc", k=source.randint(0, 14))
    others = source.choices("abcd", k=source.randint(0, 14))
    found = list(_common_words(words, others))
    lengths = [[0] * (len(others) + 1) for _ in range(len(words) + 1)]
    for i, word in enumerate(words):
        for j, other in enumerate(others):
            lengths[i + 1][j + 1] = (
                lengths[i][j] + 1 if word == other else max(lengths[i][j + 1], lengths[i + 1][j])
            )
    assert len(found) == lengths[-1][-1]
    assert all(words[i] == others[j] for i, j in found)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(found))


def test_long_responses_without_common_words_and_repetitions() -> None:
    """Quadratic algorithms on words need minutes here; the test's time limit is the bound."""
    ours = " ".join(f"a{number}" for number in range(4000))
    theirs = " ".join(f"b{number}" for number in range(4000))
    assert marked(ours, theirs) == [ours]
    source = random.Random(0)
    babble, other = (" ".join(source.choices("ab", k=8000)) for _ in range(2))
    assert 0.5 < difference(babble, other).similarity < 1
