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
from dpo_dist.insight.doctor.findings import Finding, Rules

Keys: TypeAlias = npt.NDArray[np.uint64]
Matrix: TypeAlias = Any
"""scipy.sparse.csr_matrix [pairs, features]: those of the chosen side minus those of the rejected side."""

_FEWEST_PROMPTS, _FEWEST_PROMPTS_OF_GROUPS = 10, 50
# Many features of many sources are tested: an interval of 3 standard errors instead of 2. Of forms, hundreds
# of words are compared; 17 pairs are enough if all are on one side.
_STANDARD_ERRORS, _STANDARD_ERRORS_OF_FORMS = 3.0, 4.0
_MIN_DIFFERS = 0.03
"""A form of fewer pairs is not reported as one-sided."""
_MIN_WORD_PAIRS = 5
_SHOWN_FORMS = 3
_ADDS = 0.03
"""A group of features has to be so much better than the length; else it only follows the length."""
_LENGTH, _LANGUAGE = "length", "language of the prompt"
_MORE, _LESS = "the chosen side has more", "the chosen side has less"
_PLACES = {
    "first 1": "first word",
    "first 2": "second word",
    "first 3": "third word",
    "last 1": "last word",
    "last 2": "last word but one",
    "last 3": "last word but two",
}
_STYLE = {"punctuation", "markdown", "language", "refusal"}
_INTENDED = {"characters", "refusal", _LANGUAGE}
"""Features that are preferred on purpose, and need no hint if they are one-sided."""
_GROUPS = (*(name for name in GROUPS if name != _LENGTH), "first words", "last words")
_WORDS = {"first words": ("first word", "second word", "third word"), "last words": ("last word",)}
_MEMBERS = GROUPS | {"language": (*GROUPS["language"], _LANGUAGE)}


@dataclass(frozen=True)
class LeakTest:
    """Held-out accuracy of guessing the chosen response from a side-feature, or a group of them, alone."""

    feature: str
    accuracy: float  # a tie counts as one half; `low` and `high` are its confidence interval
    low: float
    high: float
    pairs: int
    differs: float  # share of the pairs whose sides differ in the feature
    differing_prompts: int
    detail: str = ""  # the direction; empty for a group

    def exceeds(self, threshold: float) -> bool:
        """Return whether the accuracy is above the threshold, and above chance beyond its interval."""
        return self.accuracy > threshold and self.low > 0.5

    @property
    def one_sided_share(self) -> float:
        """Held-out share of a form's pairs that have it on the same side; 0 if few or by chance."""
        if self.differs < _MIN_DIFFERS:
            return 0.0
        share, prompts = 0.5 + (self.accuracy - 0.5) / self.differs, self.differing_prompts
        low, _high = interval(share * prompts, prompts, _STANDARD_ERRORS_OF_FORMS)
        return share if low > 0.5 else 0.0


def leak_tests(
    features: npt.NDArray[np.float32],
    words: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
    prompts: Keys,
    languages: npt.NDArray[np.float64],
) -> list[LeakTest]:
    """Return the held-out accuracy of each feature and of each group, the most accurate first.

    With fewer than 50 different prompts features are tested one by one, with fewer than 10 not at all. Of the
    first and of the last words the most one-sided one has a test of its own.

    `features` are [pairs, 2, features] of the chosen and the rejected side, `prompts` keys of the pairs'
    prompts, and `languages` of the first pairs 1 if only the chosen side has the language of the prompt, -1
    if only the rejected one, else 0.
    """
    different = len(np.unique(prompts))
    if different < _FEWEST_PROMPTS:
        return []
    numbers = features[:, 0] - features[:, 1]
    tests = [_single_test(numbers[:, index], prompts, name) for index, name in enumerate(NAMES)]
    known = prompts[: len(languages)]
    if len(np.unique(known)) >= _FEWEST_PROMPTS:
        tests.append(_single_test(languages, known, _LANGUAGE))
    if different >= _FEWEST_PROMPTS_OF_GROUPS:
        scale = np.sqrt((numbers.astype(np.float64) ** 2).mean(axis=0))
        scaled = sparse.csr_matrix(numbers / np.where(scale > 0, scale, 1))
        for name, members in GROUPS.items():
            if name not in (_LENGTH, *NAMES):  # a group of one feature has been tested
                tests.append(_test(scaled[:, [NAMES.index(member) for member in members]], prompts, name))
        for place in ("first", "last"):
            tests += _tests_of_words(words, place, prompts)
    return sorted(tests, key=lambda test: -test.accuracy)


def _single_test(difference: npt.NDArray[Any], prompts: Keys, name: str) -> LeakTest:
    """Test one feature: the chosen side has more of it, or less, as the other folds suggest."""
    signs = np.sign(difference)
    detail = "" if not signs.sum() else _MORE if signs.sum() > 0 else _LESS
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
            LogisticRegression(C=0.15, fit_intercept=False, max_iter=200),
            sparse.vstack([block, -block]).tocsr(),
            np.repeat([1, -1], pairs),
            groups=np.tile(prompts, 2),
            cv=GroupKFold(5, shuffle=True, random_state=0),
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


def _tests_of_words(
    words: Sequence[tuple[tuple[str, ...], tuple[str, ...]]], place: str, prompts: Keys
) -> Iterator[LeakTest]:
    """Yield the tests of the first or last words, and of the one that is most surely on one side only.

    A word counts 1 on the chosen side, -1 on the rejected one; words of few pairs are left out.
    """
    differences = [
        {word: 1.0 if word in chosen else -1.0 for word in {*chosen} ^ {*rejected} if word.startswith(place)}
        for chosen, rejected in words
    ]
    vectorizer = DictVectorizer()
    block = vectorizer.fit_transform(differences).tocsc()
    kept = np.flatnonzero(block.getnnz(axis=0) >= _MIN_WORD_PAIRS)
    if not len(kept):
        return
    block = block[:, kept]
    counts, sums = block.getnnz(axis=0), np.abs(np.asarray(block.sum(axis=0)).ravel())
    frequent = np.flatnonzero(counts >= _MIN_DIFFERS * len(prompts))
    if len(frequent):
        at = max(frequent, key=lambda one: interval((counts[one] + sums[one]) / 2, int(counts[one]))[0])
        position, _, word = vectorizer.feature_names_[kept[at]].partition("=")
        shown = f"{_PLACES[position]} {word!r}"  # "last word but one 'you'"
        yield _single_test(block[:, [at]].toarray().ravel(), prompts, shown)
    yield _test(block, prompts, f"{place} words")


def leak_findings(tests: Iterable[LeakTest], rules: Rules, source: str) -> Iterator[Finding]:
    """Yield the findings about label leaks.

    A group of features counts if it reveals the chosen response better than the length, which is a finding of
    its own.
    """
    by_name = {test.feature: test for test in tests}
    if not by_name:
        return
    length, explained = by_name["characters"], 0.0
    if length.exceeds(rules["length_bias"].threshold):
        explained = length.accuracy + _ADDS
        side = "shorter" if length.detail == _LESS else "longer"
        detail = f"the {side} one is chosen in {percent(length.accuracy)} of the pairs"
        yield from rules["length_bias"].value(length.accuracy, length.pairs, source, detail)
    for name in _GROUPS:
        rule = rules["style_bias" if name in _STYLE else "label_leak"]
        own = [
            test
            for feature, test in by_name.items()
            if feature in (name, *_MEMBERS.get(name, ())) or feature.startswith(_WORDS.get(name, "\n"))
        ]
        test = max(own, key=lambda one: one.accuracy, default=None)
        if test is None or not test.exceeds(rule.threshold) or test.accuracy <= explained:
            continue
        best = max((one for one in own if one.detail), key=lambda one: one.accuracy)
        detail = (
            f"by {name}, {percent(test.accuracy)} [{percent(test.low)}, {percent(test.high)}] of held-out "
            f"pairs are guessed ({best.feature}, {best.detail}, {percent(best.accuracy)})"
        )
        yield from rule.value(test.accuracy, test.pairs, source, detail)
    yield from _one_sided_forms(by_name, rules, source)


def _one_sided_forms(by_name: Mapping[str, LeakTest], rules: Rules, source: str) -> Iterator[Finding]:
    """Yield the finding of features that few pairs have, and these almost always on the same side."""
    rule, leak = rules["one_sided_form"], rules["label_leak"].threshold
    forms = [
        test
        for name, test in by_name.items()
        if test.detail and name not in _INTENDED and not test.exceeds(leak)
    ]
    found = [test for test in forms if test.one_sided_share > rule.threshold]
    if not found:
        return
    found.sort(key=lambda test: -round(test.differs * test.pairs))
    detail = "; ".join(
        f"{test.feature} ({test.detail} in {percent(test.one_sided_share)} of the "
        f"{round(test.differs * test.pairs)} pairs that differ in it)"
        for test in found[:_SHOWN_FORMS]
    )
    more = len(found) - _SHOWN_FORMS
    detail += f"; and {more} more" if more > 0 else ""
    largest = max(test.one_sided_share for test in found)
    yield from rule.value(largest, found[0].pairs, source, detail)
