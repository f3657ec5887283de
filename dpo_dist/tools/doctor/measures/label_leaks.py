"""Find label leaks: can the chosen response of held-out pairs be guessed from its form alone?

A pair is represented by the chosen side's features minus the rejected side's: a linear classifier w guesses
right if w (chosen - rejected) > 0, whatever the balance of labels. Folds share no prompt. The classifier is
a logistic regression (a Bradley-Terry model of the features, doi:10.2307/2334029).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

from dpo_dist.foundation.text import percent
from dpo_dist.tools.doctor.measures.texts import GROUPS
from dpo_dist.tools.doctor.rules import DOCTOR_RULES
from dpo_dist.tools.findings import Finding
from dpo_dist.tools.intervals import wilson_interval

_Keys: TypeAlias = npt.NDArray[np.uint64]
Matrix: TypeAlias = Any
"""scipy.sparse.csr_matrix [pairs, features]: the chosen side's features minus the rejected side's."""

_FEWEST_PROMPTS, _FEWEST_PROMPTS_FOR_GROUPS = 10, 50
# Many features of many sources are tested, so intervals have 3 standard errors instead of 2. One-sided forms
# are chosen among hundreds of words, so theirs have 4: 17 pairs are enough if all are on one side.
_STANDARD_ERRORS, _STANDARD_ERRORS_FOR_FORMS = 3.0, 4.0
_MIN_DIFFERS = 0.03
"""A form is reported as one-sided only if the sides differ in it in at least this share of the pairs."""
_MIN_WORD_PAIRS = 5
_SHOWN_FORMS = 3
_ADDS = 0.03
"""A group must be this much more accurate than the length; else its features may only follow the length."""
_MORE, _LESS = "the chosen side has more", "the chosen side has less"
_WORDS = ("first words", "last words")
_STYLE = ("punctuation", "markdown", "language", "refusal")
_INTENDED = ("length", "refusal")
"""Groups that people prefer on purpose: not reported if they are one-sided."""


@dataclass(frozen=True)
class LeakTest:
    """Held-out accuracy of guessing the chosen response from one feature, or one group of features, alone."""

    feature: str
    group: str
    accuracy: float  # a tie counts as one half; `low` and `high` are its confidence interval
    low: float
    high: float
    pairs: int
    differs: float  # share of the pairs whose sides differ in the feature
    differing_prompts: int
    detail: str = ""  # the direction; empty for a group

    def exceeds(self, threshold: float) -> bool:
        """Return whether the accuracy is above the threshold, and its interval above chance."""
        return self.accuracy > threshold and self.low > 0.5

    @property
    def one_sided_share(self) -> float:
        """Share of the pairs with a form that have it on the same side; 0 if few have it, or by chance."""
        if self.differs < _MIN_DIFFERS:
            return 0.0
        share, prompts = 0.5 + (self.accuracy - 0.5) / self.differs, self.differing_prompts
        low, _high = wilson_interval(share * prompts, prompts, _STANDARD_ERRORS_FOR_FORMS)
        return share if low > 0.5 else 0.0


def leak_tests(differences: Sequence[Mapping[str, float]], prompts: _Keys) -> list[LeakTest]:
    """Return the held-out accuracy of each feature and of each group, the most accurate first.

    `differences`: `texts.differences` of each pair; `prompts`: keys of their prompts. With fewer than 50
    different prompts features are tested one by one, with fewer than 10 not at all. Among first words and
    among last words, the most one-sided word has a test of its own.
    """
    different = len(np.unique(prompts))
    if different < _FEWEST_PROMPTS:
        return []
    vectorizer = DictVectorizer()
    table = vectorizer.fit_transform(differences).tocsc()
    columns: dict[str, list[int]] = defaultdict(list)
    for column, name in enumerate(vectorizer.feature_names_):
        words = "last words" if name.startswith("last word") else "first words"
        columns[GROUPS.get(name, words)].append(column)
    tests: list[LeakTest] = []
    for group, members in columns.items():
        kept = tested = members
        if group in _WORDS:
            block = table[:, members]
            counts, sums = block.getnnz(axis=0), np.abs(np.asarray(block.sum(axis=0)).ravel())
            known = [at for at in range(len(members)) if counts[at] >= _MIN_WORD_PAIRS]
            frequent = [at for at in known if counts[at] >= _MIN_DIFFERS * block.shape[0]]
            frequent.sort(key=lambda at: -_interval((counts[at] + sums[at]) / 2, int(counts[at]))[0])
            kept, tested = [members[at] for at in known], [members[at] for at in frequent[:1]]
        if group not in _WORDS or different >= _FEWEST_PROMPTS_FOR_GROUPS:
            names = vectorizer.feature_names_
            tests += [_test(table[:, [column]], prompts, names[column], group) for column in tested]
        if len(kept) > 1 and different >= _FEWEST_PROMPTS_FOR_GROUPS:
            tests.append(_test(table[:, kept], prompts, group, group))
    return sorted(tests, key=lambda test: -test.accuracy)


def _interval(successes: float, trials: int) -> tuple[float, float]:
    return wilson_interval(successes, trials, _STANDARD_ERRORS)


def _test(block: Matrix, prompts: _Keys, name: str, group: str) -> LeakTest:
    """Test a group of features, or the sign of one feature, by a cross-validated linear classifier.

    Each pair is learnt in both orders. Pairs of the same prompt are not independent, so the interval counts
    prompts.
    """
    block, detail = sparse.csr_matrix(block), ""
    if block.shape[1] == 1:
        block = block.sign()
        if difference := block.sum():
            detail = _MORE if difference > 0 else _LESS
    elif group not in _WORDS:
        block = StandardScaler(with_mean=False).fit(sparse.vstack([block, -block])).transform(block)
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
    low, high = _interval(accuracy * different, different)
    differs = block.getnnz(axis=1) > 0
    differing = len(np.unique(prompts[differs]))
    return LeakTest(name, group, accuracy, low, high, pairs, float(differs.mean()), differing, detail)


def leak_findings(tests: Sequence[LeakTest], source: str) -> Iterator[Finding]:
    """Yield the findings about label leaks.

    A group of features is reported if it reveals the chosen response better than the length does; the length
    has a finding of its own.
    """
    groups: dict[str, list[LeakTest]] = defaultdict(list)
    for test in tests:  # the most accurate of a group comes first
        groups[test.group].append(test)
    explained = 0.0
    for length in groups.pop("length", ()):
        if length.exceeds(DOCTOR_RULES["length_bias"].threshold):
            explained = length.accuracy + _ADDS
            side = "fewer" if length.detail == _LESS else "more"
            detail = (
                f"the one with {side} {length.feature} is chosen in {percent(length.accuracy)} of the pairs"
            )
            yield from DOCTOR_RULES["length_bias"].value(length.accuracy, length.pairs, source, detail)
    for group, members in groups.items():
        rule, test = DOCTOR_RULES["style_bias" if group in _STYLE else "label_leak"], members[0]
        if test.exceeds(rule.threshold) and test.accuracy > explained:
            single = next((member for member in members if member.detail), None)
            hint = f" ({single.feature}, {single.detail}, {percent(single.accuracy)})" if single else ""
            detail = (
                f"by {group}, {percent(test.accuracy)} [{percent(test.low)}, {percent(test.high)}] of "
                f"held-out pairs are guessed{hint}"
            )
            yield from rule.value(test.accuracy, test.pairs, source, detail)
    yield from _one_sided_forms(tests, source)


def _one_sided_forms(tests: Sequence[LeakTest], source: str) -> Iterator[Finding]:
    """Yield the finding about features that may be rare, but are almost always on the same side."""
    rule, leak = DOCTOR_RULES["one_sided_form"], DOCTOR_RULES["label_leak"].threshold
    forms = [
        test
        for test in tests
        if test.detail
        and test.group not in _INTENDED
        and not test.exceeds(leak)
        and test.one_sided_share > rule.threshold
    ]
    forms.sort(key=lambda test: -round(test.differs * test.pairs))
    details = [
        f"{test.feature} ({test.detail} in {percent(test.one_sided_share)} of the "
        f"{round(test.differs * test.pairs)} pairs that differ in it)"
        for test in forms[:_SHOWN_FORMS]
    ]
    details += [f"and {len(forms) - _SHOWN_FORMS} more"] if len(forms) > _SHOWN_FORMS else []
    if forms:
        largest = max(test.one_sided_share for test in forms)
        yield from rule.value(largest, forms[0].pairs, source, "; ".join(details))
