"""Sum up the facts about the records of one source, and find its faults.

A label leak: can the chosen response be guessed from one feature of its form alone? The guess is the side
that has more of the feature, or less, whichever is right more often; a tie counts as one half.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from dpo_dist.data import DataConfig
from dpo_dist.data.counts import reason_remedy
from dpo_dist.foundation.text import percent
from dpo_dist.kit import wilson_interval
from dpo_dist.tools.doctor.measures.observe import SIDES, PairFacts, RecordFacts
from dpo_dist.tools.doctor.measures.texts import subtract_features
from dpo_dist.tools.doctor.rules import DOCTOR_RULES, KINDS_BY_RULE, MAX_EXAMPLES
from dpo_dist.tools.findings import Finding

_FEWEST_PROMPTS = 10
# Many features of many sources are tested, so intervals have 3 standard errors instead of 2. One-sided forms
# are chosen among hundreds of words, so theirs have 4: 17 pairs are enough if all are on one side.
_STANDARD_ERRORS = 3.0
_STANDARD_ERRORS_FOR_FORMS = 4.0
_MIN_DIFFERS = 0.03
"""Features in which the sides differ in a smaller share of the pairs are not tested."""
_ONE_SIDED = 0.9
_MOST_TESTS = 30
_SHOWN_FORMS = 5
_ADDS = 0.03
"""A feature must be this much more accurate than the length; else it may only follow the length."""
_LENGTHS = ("tokens", "characters")


@dataclass(frozen=True)
class LeakTest:
    """How often the chosen response is guessed right from one feature alone; doctor.json has these fields.

    `low` and `high`: three standard errors, of so many pairs as there are different prompts. `differs`: share
    of the pairs whose sides differ in the feature. `one_sided`: share of these that have more of it on the
    same side; 0 if that can be chance.
    """

    feature: str
    accuracy: float
    low: float
    high: float
    pairs: int
    differs: float
    one_sided: float
    detail: str

    def exceeds(self, threshold: float) -> bool:
        """Return whether the accuracy is above the threshold, and its interval above chance."""
        return self.accuracy > threshold and self.low > 0.5


def leak_tests(differences: Sequence[Mapping[str, float]], prompts: Sequence[int]) -> list[LeakTest]:
    """Return the tests of the features, the most accurate first; none with fewer than 10 different prompts.

    `differences`: `texts.differences` of each pair; `prompts`: keys of their prompts. Pairs of the same
    prompt are not independent, so that intervals count prompts.
    """
    pairs = len(prompts)
    different = len(set(prompts))
    if different < _FEWEST_PROMPTS:
        return []
    more = Counter[str]()
    less = Counter[str]()
    differing = defaultdict[str, set[int]](set)
    for gaps, prompt in zip(differences, prompts, strict=True):
        for name, gap in gaps.items():
            side = more if gap > 0 else less
            side[name] += 1
            differing[name].add(prompt)
    tests = []
    for name, prompts_of_name in differing.items():
        count = more[name] + less[name]
        if count < _MIN_DIFFERS * pairs:
            continue
        most = max(more[name], less[name])
        accuracy = (most + (pairs - count) / 2) / pairs
        low, high = wilson_interval(accuracy * different, different, _STANDARD_ERRORS)
        share = most / count
        independent = len(prompts_of_name)
        certain, _ = wilson_interval(share * independent, independent, _STANDARD_ERRORS_FOR_FORMS)
        one_sided = share if certain > 0.5 else 0.0
        detail = f"the chosen side has {'more' if more[name] >= less[name] else 'less'}"
        tests.append(LeakTest(name, accuracy, low, high, pairs, count / pairs, one_sided, detail))
    return sorted(tests, key=lambda test: -test.accuracy)[:_MOST_TESTS]


def leak_findings(tests: Sequence[LeakTest], source: str) -> Iterator[Finding]:
    """Yield the findings about label leaks: by length, and by forms that reveal more than the length does."""
    rule = DOCTOR_RULES["length_bias"]
    explained = 0.0
    forms = []
    for test in tests:
        if test.feature in _LENGTHS and test.exceeds(rule.threshold):
            explained = test.accuracy + _ADDS
            side = "more" if test.detail.endswith("more") else "fewer"
            share = percent(test.accuracy)
            detail = f"the one with {side} {test.feature} is chosen in {share} of the pairs"
            yield from rule.value(test.accuracy, test.pairs, source, detail)
    rule = DOCTOR_RULES["label_leak"]
    for test in tests:
        is_leak = test.exceeds(rule.threshold) and test.accuracy > explained
        if test.feature not in _LENGTHS and (is_leak or test.one_sided > max(_ONE_SIDED, explained)):
            forms.append(test)
    if not forms:
        return
    details = []
    for test in forms[:_SHOWN_FORMS]:
        details.append(
            f"{test.feature} ({test.detail}; it guesses {percent(test.accuracy)} of all pairs, "
            f"and differs in {round(test.differs * test.pairs)} of {test.pairs})"
        )
    if len(forms) > _SHOWN_FORMS:
        details.append(f"and {len(forms) - _SHOWN_FORMS} more")
    # A rare form has a low accuracy among all pairs.
    for finding in rule.value(1.0, forms[0].pairs, source, "; ".join(details)):
        yield replace(finding, share=forms[0].accuracy)


_SAMPLED_PAIRS = 20_000
_PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)


def _spread(lengths: Mapping[int, int]) -> dict[str, Any] | None:
    """Return mean, ends and percentiles of lengths; `lengths` counts the records of each."""
    if not lengths:
        return None
    values = np.array([*lengths])
    counts = np.array([*lengths.values()])
    percentiles = np.percentile(values, _PERCENTILES, weights=counts, method="inverted_cdf")
    return {
        "count": int(counts.sum()),
        "mean": float(np.average(values, weights=counts)),
        "smallest": min(lengths),
        "largest": max(lengths),
        "percentiles": dict(zip(_PERCENTILES, percentiles.tolist(), strict=True)),
    }


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
        # For each of `SIDES`, how many records have each length.
        self._characters, self._tokens, self._cuts = ([Counter[int]() for _ in SIDES] for _ in range(3))
        self._of_scorers = defaultdict[str, Counter[int]](Counter)

    def add(self, records: Sequence[RecordFacts]) -> None:
        """Add the facts about the next records; facts about pairs are kept for a sample only."""
        for record in records:
            if record.pair is not None:
                heapq.heappush(self._sample, (-record.pair.record, -self.read, record.pair))
                if len(self._sample) > _SAMPLED_PAIRS:
                    heapq.heappop(self._sample)
            self.read += 1
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
        for scorer, tokens in record.of_scorers.items():
            self._of_scorers[scorer][tokens] += 1
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
        return leak_tests([pair.differences for pair in pairs], [pair.prompt for pair in pairs])

    def report(self) -> dict[str, Any]:
        """Return the entry of doctor.json; docs/output.schema.json describes its fields."""
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
        for scorer, lengths in sorted(self._of_scorers.items()):
            of_scorer = {"characters": None, "tokens": _spread(lengths), "cut": 0, "cut_tokens": 0}
            sides[f"{scorer}_prompt"] = of_scorer
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
            "leaks": [dict(vars(test)) for test in self.leaks],
        }

    def findings(self) -> Iterator[Finding]:
        """Yield the findings about this source; those that compare records are in `duplicates`."""
        read = self.read
        dropped = sum(records.count for records in self._reasons.values())
        refusal = ""
        if not self._kept:
            refusal = f"none of {read} records can be used"
        elif dropped > self._config.max_bad_share * read:
            refusal = f"{dropped} of {read} records cannot be used, more than data.max_bad_share allows"
        if refusal:
            remedy = "check the path, or remove the source"
            if self._dropped:
                most_frequent, _ = next(iter(self._dropped))
                remedy = reason_remedy(most_frequent)
            for finding in DOCTOR_RULES["training_refuses"].value(1, read, self.label, refusal):
                yield replace(finding, remedy=remedy)
        for reason, records in self._dropped:
            detail = f"{reason} ({records.detail})" if records.detail else reason
            rule = DOCTOR_RULES["dropped"]
            for finding in rule.count(records.count, read, self.label, records.origins, detail):
                yield replace(finding, remedy=reason_remedy(reason))
        for name in DOCTOR_RULES:
            records = self._names.get(name, _Counted())
            kinds = [kind for kind in KINDS_BY_RULE.get(name, ()) if kind in self._names]
            detail = ", ".join(f"{kind.replace('_', ' ')} in {self._names[kind].count}" for kind in kinds)
            rule = DOCTOR_RULES[name]
            yield from rule.count(records.count, self._readable, self.label, records.origins, detail)
        yield from leak_findings(self.leaks, self.label)
