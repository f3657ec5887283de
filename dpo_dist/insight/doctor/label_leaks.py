"""Label leaks: guess the chosen response from its form alone, on held-out pairs.

A pair is the difference of the features of its two sides, so a test needs no balanced labels: a linear
classifier w guesses right if w (chosen - rejected) > 0. Folds share no prompt. The classifier is a logistic
regression (a Bradley-Terry model of the side-features, doi:10.2307/2334029).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

from dpo_dist.foundation.text import percent
from dpo_dist.insight.doctor.features import GROUPS, NAMES
from dpo_dist.insight.doctor.findings import Finding, LeakTest
from dpo_dist.insight.doctor.rules import Judge

Keys: TypeAlias = npt.NDArray[np.uint64]
Matrix: TypeAlias = Any
"""scipy.sparse.csr_matrix [pairs, features]: those of the chosen side minus those of the rejected side."""
Words: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]

_FOLDS = 5
_FEWEST_PROMPTS, _FEWEST_PROMPTS_OF_GROUPS = 10, 50
_LENGTH = "length"
_LANGUAGE = "language of the prompt"
# Many features of many sources are tested: an interval of 3 standard errors instead of 2. Of forms, hundreds
# of words are compared; 17 pairs are enough if all are on one side.
_STANDARD_ERRORS, _STANDARD_ERRORS_OF_FORMS = 3.0, 4.0
_MIN_DIFFERS = 0.03
"""A form of fewer pairs is not reported as one-sided."""
_SIDE = "the chosen side has"
_MIN_WORD_PAIRS = 5
_REGULARISATION = 0.15
_SHOWN_FORMS = 3
_PLACES = {
    "first 1": "first word",
    "first 2": "second word",
    "first 3": "third word",
    "last 1": "last word",
    "last 2": "last word but one",
    "last 3": "last word but two",
}
# A group of features has to be so much better than the length; else it only follows the length.
_ADDS = 0.03
_STYLE = {"punctuation", "markdown", "language", "refusal"}
# Features that are preferred on purpose, and need no hint if they are one-sided.
_INTENDED = {"characters", "refusal", _LANGUAGE}
_GROUPS = (*(name for name in GROUPS if name != _LENGTH), "first words", "last words")
_WORDS = {"first words": ("first word", "second word", "third word"), "last words": ("last word",)}
_MEMBERS = GROUPS | {"language": (*GROUPS["language"], _LANGUAGE)}


@dataclass(frozen=True, eq=False)
class SideSample:
    """Side-features of a sample of pairs.

    Attributes:
        features: float32 [pairs, 2, features], chosen and rejected, see `features.side_features`.
        words: of the chosen and of the rejected response of each pair, see `features.edge_words`.
        prompts: uint64 [pairs], key of each pair's prompt.
        languages: float64 [first pairs]: 1 if only the chosen side has the language of the prompt, -1 if only
            the rejected one, else 0.
    """

    features: npt.NDArray[np.float32]
    words: Sequence[Words]
    prompts: Keys
    languages: npt.NDArray[np.float64]


def leak_tests(sample: SideSample) -> tuple[LeakTest, ...]:
    """Return the held-out accuracy of each feature and of each group.

    Returns:
        The most accurate first; empty if the sample has fewer than 10 different prompts. With fewer than 50,
        features are tested one by one only. Of the first and of the last words the most one-sided one has a
        test of its own.
    """
    prompts, different = sample.prompts, len(np.unique(sample.prompts))
    if different < _FEWEST_PROMPTS:
        return ()
    numbers = sample.features[:, 0] - sample.features[:, 1]
    tests = [_single_test(numbers[:, index], prompts, name) for index, name in enumerate(NAMES)]
    known = prompts[: len(sample.languages)]
    if len(np.unique(known)) >= _FEWEST_PROMPTS:
        tests.append(_single_test(sample.languages, known, _LANGUAGE))
    if different >= _FEWEST_PROMPTS_OF_GROUPS:
        tests += _tests_of_groups(numbers, sample)
    return tuple(sorted(tests, key=lambda test: -test.accuracy))


def _tests_of_groups(numbers: npt.NDArray[np.float32], sample: SideSample) -> Iterator[LeakTest]:
    scale = np.sqrt((numbers.astype(np.float64) ** 2).mean(axis=0))
    scaled = sparse.csr_matrix(numbers / np.where(scale > 0, scale, 1))
    for name in _GROUPS:
        if name in GROUPS:
            block = scaled[:, [NAMES.index(member) for member in GROUPS[name]]]
        else:
            block, words = _bag(sample.words, name.split()[0])
            if not words:
                continue
            yield from _one_sided_word(block, words, sample.prompts)
        if name not in NAMES:  # else the group is one feature, which has been tested
            yield _test(block, sample.prompts, name)


def _single_test(difference: npt.NDArray[Any], prompts: Keys, name: str) -> LeakTest:
    """Test one feature: the chosen side has more of it, or less, as the other folds suggest."""
    signs = np.sign(difference)
    detail = f"{_SIDE} {'more' if signs.sum() > 0 else 'less'}" if signs.sum() else ""
    return _test(signs.reshape(-1, 1), prompts, name, detail)


def _test(block: Matrix, prompts: Keys, name: str, detail: str = "") -> LeakTest:
    """Test a linear classifier of these features, each fold guessed by the others.

    Each pair is learnt in both orders. Pairs of the same prompt are not independent, so the interval counts
    prompts.
    """
    block = sparse.csr_matrix(block)
    pairs = block.shape[0]
    scores = np.zeros(pairs)
    if block.nnz:
        scores = cross_val_predict(
            LogisticRegression(C=_REGULARISATION, fit_intercept=False, max_iter=200),
            sparse.vstack([block, -block]).tocsr(),
            np.repeat([1, -1], pairs),
            groups=np.tile(prompts, 2),
            cv=GroupKFold(_FOLDS, shuffle=True, random_state=0),
            method="decision_function",
        )[:pairs]
    accuracy = float(((np.sign(scores) + 1) / 2).mean())
    different = len(np.unique(prompts))
    low, high = interval(accuracy * different, different)
    differs = block.getnnz(axis=1) > 0
    differing = len(np.unique(prompts[differs]))
    return LeakTest(name, accuracy, low, high, pairs, float(differs.mean()), differing, detail)


def interval(successes: float, trials: int, standard_errors: float = _STANDARD_ERRORS) -> tuple[float, float]:
    """Return Wilson's interval of a share (doi:10.1080/01621459.1927.10502953)."""
    if not trials:
        return 0.0, 1.0
    share, squared = successes / trials, standard_errors**2
    centre = (share + squared / (2 * trials)) / (1 + squared / trials)
    half = standard_errors / (1 + squared / trials)
    half *= math.sqrt(share * (1 - share) / trials + squared / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _bag(words: Sequence[Words], position: str) -> tuple[Matrix, list[str]]:
    """Return +1 for each word that only the chosen response has, -1 for the rejected one's; and the words.

    Words of few pairs are left out.
    """
    differences = [
        {
            word: 1.0 if word in chosen else -1.0
            for word in {*chosen} ^ {*rejected}
            if word.startswith(position)
        }
        for chosen, rejected in words
    ]
    vectorizer = DictVectorizer()
    block = vectorizer.fit_transform(differences).tocsc()
    kept = np.flatnonzero(block.getnnz(axis=0) >= _MIN_WORD_PAIRS)
    return block[:, kept], [vectorizer.feature_names_[at] for at in kept]


def _one_sided_word(block: Matrix, words: Sequence[str], prompts: Keys) -> Iterator[LeakTest]:
    """Yield the test of the word that is most surely on one side only, if there is a frequent one."""
    counts, sums = block.getnnz(axis=0), np.abs(np.asarray(block.sum(axis=0)).ravel())
    frequent = np.flatnonzero(counts >= _MIN_DIFFERS * len(prompts))
    if len(frequent):
        at = max(frequent, key=lambda one: interval((counts[one] + sums[one]) / 2, int(counts[one]))[0])
        yield _single_test(block[:, [at]].toarray().ravel(), prompts, _shown_word(words[int(at)]))


def _shown_word(key: str) -> str:
    """Return a word of `features.edge_words` for people: "first word 'Sure'", "last word but one 'you'"."""
    place, _, word = key.partition("=")
    return f"{_PLACES[place]} {word!r}"


def leak_findings(tests: Iterable[LeakTest], judge: Judge, source: str) -> Iterator[Finding]:
    """Yield the findings about label leaks.

    A group of features counts if it reveals the chosen response better than the length, which is a finding of
    its own.
    """
    by_name = {test.feature: test for test in tests}
    if not by_name:
        return
    length, explained = by_name["characters"], 0.0
    if _is_leak(length, judge, "length_bias"):
        explained = length.accuracy + _ADDS
        side = "shorter" if length.detail.endswith("less") else "longer"
        detail = f"the {side} one is chosen in {percent(length.accuracy)} of the pairs"
        yield from judge.value("length_bias", length.accuracy, length.pairs, source, detail)
    for name in _GROUPS:
        rule = "style_bias" if name in _STYLE else "label_leak"
        own = [
            test
            for feature, test in by_name.items()
            if feature in (name, *_MEMBERS.get(name, ())) or feature.startswith(_WORDS.get(name, "\n"))
        ]
        test = max(own, key=lambda one: one.accuracy, default=None)
        if test is None or not _is_leak(test, judge, rule) or test.accuracy <= explained:
            continue
        best = max((one for one in own if one.detail), key=lambda one: one.accuracy)
        text = (
            f"by {name}, {percent(test.accuracy)} [{percent(test.low)}, {percent(test.high)}] of held-out "
            f"pairs are guessed ({best.feature}, {best.detail}, {percent(best.accuracy)})"
        )
        yield from judge.value(rule, test.accuracy, test.pairs, source, text)
    yield from _one_sided_forms(by_name, judge, source)


def _one_sided_forms(by_name: Mapping[str, LeakTest], judge: Judge, source: str) -> list[Finding]:
    """Return the finding of features that few pairs have, and these almost always on the same side."""
    forms = [
        (round(test.differs * test.pairs), _one_sided_share(test), test)
        for name, test in by_name.items()
        if test.detail.startswith(_SIDE) and name not in _INTENDED and not _is_leak(test, judge, "label_leak")
    ]
    found = sorted(
        (form for form in forms if form[1] > judge.threshold("one_sided_form")), key=lambda form: -form[0]
    )
    if not found:
        return []
    shown = [
        f"{test.feature} ({test.detail} in {percent(share)} of the {differing} pairs that differ in it)"
        for differing, share, test in found[:_SHOWN_FORMS]
    ]
    more = f"; and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    largest = max(share for _, share, _ in found)
    return judge.value("one_sided_form", largest, found[0][2].pairs, source, "; ".join(shown) + more)


def _one_sided_share(test: LeakTest) -> float:
    """Return the held-out share of a feature's pairs that have it on the same side; 0 if few or by chance."""
    if test.differs < _MIN_DIFFERS:
        return 0.0
    share = 0.5 + (test.accuracy - 0.5) / test.differs
    # Pairs of the same prompt are not independent.
    prompts = test.differing_prompts
    low, _high = interval(share * prompts, prompts, _STANDARD_ERRORS_OF_FORMS)
    return share if low > 0.5 else 0.0


def _is_leak(test: LeakTest, judge: Judge, rule: str) -> bool:
    """Return whether a test is above the threshold, and above chance beyond its interval."""
    return test.accuracy > judge.threshold(rule) and test.low > 0.5
