"""Label leaks: guess the chosen response from its form alone, on held-out pairs.

A pair is the difference of the features of its two sides, so a test needs no balanced labels: a linear
classifier w guesses right if w (chosen - rejected) > 0. Folds share no prompt. The classifier is a logistic
regression (a Bradley-Terry model of the side-features, doi:10.2307/2334029).
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from dpo_dist.insight.doctor.features import GROUPS, NAMES
from dpo_dist.insight.doctor.findings import LeakTest

Keys: TypeAlias = npt.NDArray[np.uint64]
Matrix: TypeAlias = Any
"""scipy.sparse.csr_matrix [pairs, features]."""

FOLDS = 5
MIN_PAIRS, MIN_PAIRS_OF_GROUPS = 10, 50
ALL = "all"
LENGTH = "length"
# Many features of many sources are tested: an interval of 3 standard errors instead of 2.
_STANDARD_ERRORS = 3.0
MIN_DIFFERS = 0.03
"""A form of fewer pairs is not reported as one-sided."""
SIDE = "the chosen side has"
"""Start of the details of a test of one feature."""
_MIN_WORD_PAIRS = 5
_REGULARISATION = 0.3
_SHOWN_WORDS = 3
_PLACES = {
    "first 1": "first word",
    "first 2": "second word",
    "first 3": "third word",
    "last 1": "last word",
    "last 2": "last word but one",
    "last 3": "last word but two",
}


@dataclass(frozen=True, eq=False)
class SideSample:
    """Side-features of a sample of pairs.

    Attributes:
        features: float32 [pairs, 2, features], chosen and rejected, see `features.side_features`.
        words: of the chosen and of the rejected response of each pair, see `features.edge_words`.
        prompts: uint64 [pairs], key of each pair's prompt.
    """

    features: npt.NDArray[np.float32]
    words: list[tuple[tuple[str, ...], tuple[str, ...]]]
    prompts: npt.NDArray[np.uint64]


def leak_tests(sample: SideSample) -> tuple[LeakTest, ...]:
    """Return the held-out accuracy of each feature, of each group and of all features together.

    Returns:
        The most accurate first; empty if the sample has fewer than 10 different prompts. With fewer than 50,
        features are tested one by one only. `length and GROUP` measures how much a group adds to the length.
        Of the first and of the last words the most one-sided one has a test of its own.
    """
    folds, groups = _folds(sample.prompts)
    if groups < MIN_PAIRS:
        return ()
    numbers = sample.features[:, 0] - sample.features[:, 1]
    tests = [single_test(numbers[:, index], sample.prompts, name) for index, name in enumerate(NAMES)]
    blocks = _blocks(numbers, sample.words) if groups >= MIN_PAIRS_OF_GROUPS else {}
    for name, block in blocks.items():
        if block.shape[1] and name != LENGTH:
            if name not in NAMES:  # else the group is one feature, which has been tested
                detail = ""
                if name.endswith(" words"):
                    detail = _telling_words(sample.words, name.split()[0])
                    tests += _one_sided_word(sample, name.split()[0])
                tests.append(_classified(block, folds, sample.prompts, name, detail))
            both = sparse.hstack([blocks[LENGTH], block])
            tests.append(_classified(both, folds, sample.prompts, f"length and {name}"))
    if blocks:
        tests.append(_classified(sparse.hstack(list(blocks.values())), folds, sample.prompts, ALL))
    return tuple(sorted(tests, key=lambda test: -test.accuracy))


def interval(successes: float, trials: int, standard_errors: float = _STANDARD_ERRORS) -> tuple[float, float]:
    """Return Wilson's interval of a share (doi:10.1080/01621459.1927.10502953)."""
    if not trials:
        return 0.0, 1.0
    share, squared = successes / trials, standard_errors**2
    centre = (share + squared / (2 * trials)) / (1 + squared / trials)
    half = standard_errors / (1 + squared / trials)
    half *= math.sqrt(share * (1 - share) / trials + squared / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def single_test(difference: npt.NDArray[np.floating[Any]], prompts: Keys, name: str) -> LeakTest:
    """Test one feature: the chosen side has more of it, or less, as the other folds suggest.

    Args:
        difference: [pairs], feature of the chosen side minus that of the rejected side.
        prompts: uint64 [pairs], key of each pair's prompt.
        name: of the feature.
    """
    folds, _groups = _folds(prompts)
    signs = np.sign(difference)
    by_fold = np.bincount(folds, weights=signs, minlength=FOLDS)
    direction = np.sign(signs.sum() - by_fold)[folds]
    detail = f"{SIDE} {'more' if signs.sum() > 0 else 'less'}" if signs.sum() else ""
    return _test(signs * direction, prompts, name, detail, signs != 0)


def _folds(prompts: Keys) -> tuple[npt.NDArray[np.int64], int]:
    """Return the fold of each pair, and the number of different prompts. Folds share no prompt."""
    different, numbers = np.unique(prompts, return_inverse=True)
    # Numbers in a random order, so that folds are of equal size.
    order = np.random.default_rng(0).permutation(len(different))
    return order[numbers] % FOLDS, len(different)


def _classified(
    block: Matrix, folds: npt.NDArray[np.int64], prompts: Keys, name: str, detail: str = ""
) -> LeakTest:
    """Test a linear classifier of several features, each fold guessed by the others."""
    block = sparse.csr_matrix(block)
    guesses = np.zeros(block.shape[0])
    for fold in np.unique(folds):
        held_out = folds == fold
        guesses[held_out] = block[held_out] @ _weights(block[~held_out])
    return _test(np.sign(guesses), prompts, name, detail, block.getnnz(axis=1) > 0)


def _weights(block: Matrix) -> npt.NDArray[np.float64]:
    """Return the weights of a logistic regression without intercept; half of the pairs are mirrored."""
    mirror = np.where(np.arange(block.shape[0]) % 2, -1.0, 1.0)
    model = LogisticRegression(C=_REGULARISATION, fit_intercept=False, max_iter=200)
    model.fit(sparse.diags(mirror) @ block, mirror)
    return np.asarray(model.coef_[0])


def _test(
    right: npt.NDArray[np.float64], prompts: Keys, name: str, detail: str, differs: npt.NDArray[np.bool_]
) -> LeakTest:
    """Return the test of guesses, each 1 (right), -1 (wrong) or 0 (undecided).

    Pairs of the same prompt are not independent, so the interval counts prompts.
    """
    accuracy = float(((right + 1) / 2).mean())
    groups = len(np.unique(prompts))
    low, high = interval(accuracy * groups, groups)
    differing = len(np.unique(prompts[differs]))
    return LeakTest(name, accuracy, low, high, len(right), float(differs.mean()), differing, detail)


def _blocks(
    numbers: npt.NDArray[np.float32], words: list[tuple[tuple[str, ...], tuple[str, ...]]]
) -> dict[str, Matrix]:
    """Return the differences of features by group, numbers scaled to variance 1."""
    scale = np.sqrt((numbers.astype(np.float64) ** 2).mean(axis=0))
    scaled = sparse.csr_matrix(numbers / np.where(scale > 0, scale, 1))
    blocks: dict[str, Matrix] = {}
    start = 0
    for name, members in GROUPS.items():
        blocks[name] = scaled[:, start : start + len(members)]
        start += len(members)
    for position in ("first", "last"):
        blocks[f"{position} words"] = _bag(words, position)
    return blocks


def _bag(words: list[tuple[tuple[str, ...], tuple[str, ...]]], position: str) -> Matrix:
    """Return +1 for each word that only the chosen response has, -1 for the rejected one's."""
    found = [({*chosen} ^ {*rejected}, {*chosen}) for chosen, rejected in words]
    counts = Counter(word for differing, _ in found for word in differing if word.startswith(position))
    column = {
        word: number for number, word in enumerate(w for w, n in counts.items() if n >= _MIN_WORD_PAIRS)
    }
    entries = [
        (row, column[word], 1.0 if word in chosen else -1.0)
        for row, (differing, chosen) in enumerate(found)
        for word in differing
        if word in column
    ]
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(words), len(column)))


def _telling_words(words: list[tuple[tuple[str, ...], tuple[str, ...]]], position: str) -> str:
    """Return the words that most often distinguish the sides, quoted, with their counts on either side."""
    chosen, rejected = _one_sided_counts(words, position)

    def strength(word: str) -> float:
        return abs(chosen[word] - rejected[word]) / math.sqrt(chosen[word] + rejected[word])

    # Equal strengths in alphabetical order, so that the report is reproducible.
    telling = sorted(chosen.keys() | rejected.keys(), key=lambda word: (-strength(word), word))[:_SHOWN_WORDS]
    return ", ".join(f"{_shown(key)} (chosen {chosen[key]}, rejected {rejected[key]})" for key in telling)


def _one_sided_word(sample: SideSample, position: str) -> list[LeakTest]:
    """Return the test of the word that is most surely on one side only; none if all words are rare."""
    chosen, rejected = _one_sided_counts(sample.words, position)
    bounds = {
        word: interval(max(chosen[word], rejected[word]), count)[0]
        for word, count in (chosen + rejected).items()
        if count >= MIN_DIFFERS * len(sample.words)
    }
    if not bounds:
        return []
    word = max(sorted(bounds), key=lambda each: bounds[each])
    difference = np.array([(word in better) - float(word in worse) for better, worse in sample.words])
    return [single_test(difference, sample.prompts, _shown(word))]


def _one_sided_counts(
    words: list[tuple[tuple[str, ...], tuple[str, ...]]], position: str
) -> tuple[Counter[str], Counter[str]]:
    """Return the number of pairs in which only the chosen, and only the rejected side has each word."""
    chosen, rejected = (
        Counter(
            word for pair in words for word in {*pair[side]} - {*pair[1 - side]} if word.startswith(position)
        )
        for side in (0, 1)
    )
    return chosen, rejected


def _shown(key: str) -> str:
    """Return a word of `features.edge_words` for people: "first word 'Sure'", "last word but one 'you'"."""
    place, _, word = key.partition("=")
    return f"{_PLACES[place]} {word!r}"
