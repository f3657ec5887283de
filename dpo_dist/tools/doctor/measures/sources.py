"""Sum up the facts about the records of one source, and find its faults.

A label leak: can the chosen response of held-out pairs be guessed from its form alone? A pair is represented
by the chosen side's features minus the rejected side's: a linear classifier w guesses right if
w (chosen - rejected) > 0, whatever the balance of labels. Folds share no prompt. The classifier is a logistic
regression (a Bradley-Terry model of the features, doi:10.2307/2334029).
"""

import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

from dpo_dist.data import DataConfig, named_in_one_line
from dpo_dist.data.counts import reason_remedy
from dpo_dist.foundation.text import percent
from dpo_dist.kit import wilson_interval
from dpo_dist.tools.doctor.measures.observe import SIDES, PairFacts, RecordFacts
from dpo_dist.tools.doctor.measures.texts import GROUPS, subtract_features
from dpo_dist.tools.doctor.rules import DOCTOR_RULES, KINDS_BY_RULE, MAX_EXAMPLES
from dpo_dist.tools.findings import Finding
from dpo_dist.tools.pages.charts import distribution

_Keys: TypeAlias = npt.NDArray[np.uint64]
Matrix: TypeAlias = Any
"""scipy.sparse.csr_matrix [pairs, features]: the chosen side's features minus the rejected side's."""

_FEWEST_PROMPTS = 10
_FEWEST_PROMPTS_FOR_GROUPS = 50
# Many features of many sources are tested, so intervals have 3 standard errors instead of 2. One-sided forms
# are chosen among hundreds of words, so theirs have 4: 17 pairs are enough if all are on one side.
_STANDARD_ERRORS = 3.0
_STANDARD_ERRORS_FOR_FORMS = 4.0
_MIN_DIFFERS = 0.03
"""A form is reported as one-sided only if the sides differ in it in at least this share of the pairs."""
_MIN_WORD_PAIRS = 5
_SHOWN_FORMS = 3
_ADDS = 0.03
"""A group must be this much more accurate than the length; else its features may only follow the length."""
_CHOSEN_HAS = {1: "the chosen side has more", -1: "the chosen side has less", 0: ""}
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
    direction: int = 0  # 1: the chosen side has more of the feature, -1: less; 0: neither, or a group

    @property
    def detail(self) -> str:
        """The direction in words; empty for a group."""
        return _CHOSEN_HAS[self.direction]

    def as_dict(self) -> dict[str, Any]:
        """Return the test for doctor.json, with its direction in words."""
        fields = {**vars(self), "detail": self.detail}
        del fields["direction"]
        return fields

    @property
    def differing_pairs(self) -> int:
        """The number of pairs whose sides differ in the feature."""
        return round(self.differs * self.pairs)

    def exceeds(self, threshold: float) -> bool:
        """Return whether the accuracy is above the threshold, and its interval above chance."""
        return self.accuracy > threshold and self.low > 0.5

    @property
    def one_sided_share(self) -> float:
        """Share of the pairs with a form that have it on the same side; 0 if few have it, or by chance."""
        if self.differs < _MIN_DIFFERS:
            return 0.0
        share = 0.5 + (self.accuracy - 0.5) / self.differs
        prompts = self.differing_prompts
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
    for group, features in columns.items():
        members = features
        single = features  # those that have a test of their own
        has_groups = different >= _FEWEST_PROMPTS_FOR_GROUPS
        if group in _WORDS:
            block = table[:, features]
            counts = block.getnnz(axis=0)
            sums = np.abs(np.asarray(block.sum(axis=0)).ravel())
            usual = [at for at in range(len(features)) if counts[at] >= _MIN_WORD_PAIRS]
            frequent = [at for at in usual if counts[at] >= _MIN_DIFFERS * block.shape[0]]
            frequent.sort(key=lambda at: -_interval((counts[at] + sums[at]) / 2, int(counts[at]))[0])
            single = [features[at] for at in frequent[:1]]
            members = [features[at] for at in usual]
        if group not in _WORDS or has_groups:
            for column in single:
                name = vectorizer.feature_names_[column]
                tests.append(_test(table[:, [column]], prompts, name, group))
        if len(members) > 1 and has_groups:
            tests.append(_test(table[:, members], prompts, group, group))
    return sorted(tests, key=lambda test: -test.accuracy)


def _interval(successes: float, trials: int) -> tuple[float, float]:
    return wilson_interval(successes, trials, _STANDARD_ERRORS)


def _test(block: Matrix, prompts: _Keys, name: str, group: str) -> LeakTest:
    """Test a group of features, or the sign of one feature, by a cross-validated linear classifier.

    Each pair is learnt in both orders. Pairs of the same prompt are not independent, so the interval counts
    prompts.
    """
    block = sparse.csr_matrix(block)
    direction = 0
    if block.shape[1] == 1:
        block = block.sign()
        direction = int(np.sign(block.sum()))
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
    return LeakTest(name, group, accuracy, low, high, pairs, float(differs.mean()), differing, direction)


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
        rule = DOCTOR_RULES["length_bias"]
        if length.exceeds(rule.threshold):
            explained = length.accuracy + _ADDS
            side = "fewer" if length.direction < 0 else "more"
            share = percent(length.accuracy)
            detail = f"the one with {side} {length.feature} is chosen in {share} of the pairs"
            yield from rule.value(length.accuracy, length.pairs, source, detail)
    for group, members in groups.items():
        name = "style_bias" if group in _STYLE else "label_leak"
        rule = DOCTOR_RULES[name]
        test = members[0]
        if test.exceeds(rule.threshold) and test.accuracy > explained:
            detail = (
                f"from {group} alone, the chosen response is guessed in {percent(test.accuracy)} "
                f"[{percent(test.low)}, {percent(test.high)}] of held-out pairs"
            )
            single = next((member for member in members if member.direction), None)
            if single:
                detail += f" ({single.feature}, {single.detail}, {percent(single.accuracy)})"
            yield from rule.value(test.accuracy, test.pairs, source, detail)
    yield from _one_sided_forms(tests, source)


def _one_sided_forms(tests: Sequence[LeakTest], source: str) -> Iterator[Finding]:
    """Yield the finding about features that may be rare, but are almost always on the same side."""
    rule = DOCTOR_RULES["one_sided_form"]
    leak = DOCTOR_RULES["label_leak"].threshold
    forms = []
    for test in tests:
        is_group = not test.direction
        if is_group or test.group in _INTENDED or test.exceeds(leak):
            continue
        if test.one_sided_share > rule.threshold:
            forms.append(test)
    if not forms:
        return
    forms.sort(key=lambda test: -test.differing_pairs)
    details = [
        f"{test.feature} ({test.detail} in {percent(test.one_sided_share)} of the "
        f"{test.differing_pairs} pairs that differ in it)"
        for test in forms[:_SHOWN_FORMS]
    ]
    if len(forms) > _SHOWN_FORMS:
        details.append(f"and {len(forms) - _SHOWN_FORMS} more")
    largest = max(test.one_sided_share for test in forms)
    yield from rule.value(largest, forms[0].pairs, source, "; ".join(details))


_SAMPLED_PAIRS = 20_000
_MOST_FIELDS = 1000
_SHOWN_BINS = 32


def _spread(lengths: Mapping[int, int]) -> dict[str, Any] | None:
    """Return the distribution of lengths, in bins that become wider; `lengths` counts the records of each."""
    if not lengths:
        return None
    edges = np.unique(np.round(np.geomspace(min(lengths) + 1, max(lengths) + 2, _SHOWN_BINS + 1) - 1))
    return distribution(np.array([*lengths]), edges, np.array([*lengths.values()]))


@dataclass
class _Counted:
    """The number of records with a name or reason, the origins of the first ones, and the first detail."""

    count: int = 0
    origins: list[str] = field(default_factory=list)
    detail: str = ""

    def add(self, record: RecordFacts) -> None:
        """Count one more record."""
        self.count += 1
        if self.count == 1:
            self.detail = record.detail
        if self.count <= MAX_EXAMPLES:
            self.origins.append(str(record.origin))


class ExaminedSource:
    """Counts the facts about the records of one source; a readable one has a prompt and responses."""

    def __init__(self, label: str, path: str, config: DataConfig, *, is_eval: bool):
        self.label = label
        self.path = path
        self.is_eval = is_eval
        self._config = config
        self.read = self._readable = self._kept = self._held_out = 0
        self._sample: list[tuple[int, int, PairFacts]] = []  # a heap: the next one to drop comes first
        self._names = defaultdict[str, _Counted](_Counted)
        self._reasons = defaultdict[str, _Counted](_Counted)
        self._labels = {"good": 0, "bad": 0}  # of kept records
        self._examples = 0
        self._changed = Counter[str]()
        self._unread = Counter[str]()
        # For each of `SIDES`, how many records have each length.
        self._characters, self._tokens, self._cuts = ([Counter[int]() for _ in SIDES] for _ in range(3))
        self._images = {name: array("Q") for name in ("key", "pixels", "tokens")}  # tokens: 1 more; 0: none
        self._images_of_records = Counter[int]()

    def add(self, records: Sequence[RecordFacts]) -> None:
        """Add the facts about the next records; facts about pairs are kept for a sample only."""
        for record in records:
            if record.pair is not None:
                heapq.heappush(self._sample, (-record.pair.record, -self.read, record.pair))
                if len(self._sample) > _SAMPLED_PAIRS:
                    heapq.heappop(self._sample)
            self.read += 1
            if len(self._unread) < _MOST_FIELDS:
                self._unread.update(record.unread)
            for image in record.images:
                self._images["key"].append(image.key)
                self._images["pixels"].append(image.pixels)
                self._images["tokens"].append(image.tokens + 1)
            if record.images:
                self._images_of_records[len(record.images)] += 1
            if record.dropped is not None:
                self._reasons[record.dropped].add(record)
            if record.is_readable:
                self._add_readable(record)

    def _add_readable(self, record: RecordFacts) -> None:
        self._readable += 1
        for name in record.names:
            self._names[name].add(record)
        lengths = (*record.characters, *(record.tokens or ()))
        for counts, length in zip((*self._characters, *self._tokens), lengths, strict=False):
            if length >= 0:
                counts[length] += 1
        if record.dropped is None:
            self._kept += 1
            self._held_out += record.is_held_out
            if record.pair is not None and record.pair.side is not None:
                label = "good" if record.pair.side == "chosen" else "bad"
                self._labels[label] += 1
            for counts, tokens in zip(self._cuts, record.cut, strict=True):
                if tokens > 0:
                    counts[tokens] += 1
            self._examples += record.examples
            self._changed.update(record.changed)

    @cached_property
    def _pairs(self) -> list[PairFacts]:
        """The sampled pairs: those with the smallest keys, sorted by key."""
        return [pair for *_, pair in sorted(self._sample, reverse=True)]

    @cached_property
    def _dropped(self) -> list[tuple[str, _Counted]]:
        """The reasons with their records, the most frequent first."""
        return sorted(self._reasons.items(), key=lambda item: -item[1].count)

    @cached_property
    def leaks(self) -> list[LeakTest]:
        """The tests for label leaks; none for evaluation data, from which the policy does not learn."""
        texts = [pair for pair in self._pairs if not pair.is_call]
        pairs = [pair for pair in texts if pair.side is None]
        by_prompt = sorted(texts, key=lambda pair: pair.prompt)
        good, bad = ([pair for pair in by_prompt if pair.side == side] for side in SIDES[1:])
        for first, second in zip(good, bad, strict=False):  # each labelled response once
            pairs.append(replace(first, differences=subtract_features(first.differences, second.differences)))
        if not pairs or self.is_eval:
            return []
        prompts = np.array([pair.prompt for pair in pairs], dtype=np.uint64)
        return leak_tests([pair.differences for pair in pairs], prompts)

    def report(self) -> dict[str, Any]:
        """Return the entry of doctor.json; docs/doctor.md describes its fields."""
        sides = dict[str, dict[str, Any]]()
        for side, characters, lengths, cuts in zip(
            SIDES, self._characters, self._tokens, self._cuts, strict=True
        ):
            if characters:
                sides[side] = {
                    "characters": _spread(characters),
                    "tokens": _spread(lengths),
                    "cut": cuts.total(),
                    "cut_tokens": sum(tokens * records for tokens, records in cuts.items()),
                }
        held_out = self._held_out if self._config.eval_share else None
        return {
            "label": self.label,
            "path": self.path,
            "is_eval": self.is_eval,
            "read": self.read,
            "kept": self._kept,
            "pairs": self._examples,
            "held_out": held_out,
            "labels": self._labels,
            "dropped": {
                reason: {"count": records.count, "examples": records.origins}
                for reason, records in self._dropped
            },
            "changed": dict(sorted(self._changed.items())),
            "sides": sides,
            "images": self._image_facts(),
            "margins": {},
            "leaks": [test.as_dict() for test in self.leaks],
        }

    def _image_facts(self) -> dict[str, Any] | None:
        if not self._images_of_records:
            return None
        keys, pixels, placeholders = (np.array(column) for column in self._images.values())
        order = np.lexsort((placeholders > 0, keys))  # an image of a dropped record has no tokens
        last = order[np.append(keys[order[1:]] != keys[order[:-1]], True)]
        encoded = last[placeholders[last] > 0]
        return {
            "records": self._images_of_records.total(),
            "images": sum(count * records for count, records in self._images_of_records.items()),
            "different": len(last),
            "in_a_record": _spread(self._images_of_records),
            "pixels": _spread(Counter(pixels[last].tolist())),
            "tokens": _spread(Counter((placeholders[encoded] - np.uint64(1)).tolist())),
        }

    def findings(self) -> Iterator[Finding]:
        """Yield the findings about this source; those that compare records are in `duplicates`."""
        read = self.read
        dropped = sum(records.count for records in self._reasons.values())
        if not self._kept:
            most_frequent = next((reason for reason, _ in self._dropped), None)
            for finding in DOCTOR_RULES["no_records"].value(1, read, self.label, f"{read} were read"):
                yield replace(finding, remedy=reason_remedy(most_frequent))
        elif dropped > self._config.max_bad_share * read:
            detail = f"{dropped} of {read} records"
            yield from DOCTOR_RULES["too_many_dropped"].value(dropped / read, dropped, self.label, detail)
        for reason, records in self._dropped:
            detail = f"{reason} ({records.detail})" if records.detail else reason
            rule = DOCTOR_RULES["dropped"]
            for finding in rule.count(records.count, read, self.label, records.origins, detail):
                yield replace(finding, remedy=reason_remedy(reason))
        for name in DOCTOR_RULES:
            records = self._names.get(name, _Counted())
            kinds = [kind for kind in KINDS_BY_RULE.get(name, ()) if kind in self._names]
            detail = ", ".join(f"{kind.replace('_', ' ')} in {self._names[kind].count}" for kind in kinds)
            if name == "columns_not_read":
                detail = named_in_one_line(self._unread)
            rule = DOCTOR_RULES[name]
            yield from rule.count(records.count, self._readable, self.label, records.origins, detail)
        yield from leak_findings(self.leaks, self.label)
