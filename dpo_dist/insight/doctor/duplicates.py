"""Equal, nearly equal and opposite records among all sources, from keys and MinHash signatures."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from dpo_dist.config.data import DataConfig
from dpo_dist.insight.doctor.findings import Finding, Level, Rules
from dpo_dist.insight.doctor.observe import Keys
from dpo_dist.insight.doctor.sources import Source
from dpo_dist.insight.doctor.texts import EMPTY_SKETCH, SIGNATURE_NUMBERS, Signature

Partners = dict[int, int]
"""From the index of a record to that of another one with which it has something in common, ascending."""

SIMILARITY = 0.7
# 16 bands of 4 numbers: two texts of similarity 0.7 share a band with a probability of 0.99.
_BANDS, _BAND_NUMBERS = 16, 4
_SHOWN_CLUSTERS, _SHOWN_MEMBERS, _SHOWN = 5, 4, 20


def equal(keys: Iterable[int]) -> Partners:
    """Return the records whose key an earlier one has, each with the first of these."""
    first: Partners = {}
    return {index: first[key] for index, key in enumerate(keys) if first.setdefault(key, index) != index}


def near(signatures: Iterable[Signature]) -> Partners:
    """Return the records whose prompt and responses are nearly equal to those of an earlier one.

    `signatures` are uint32 [2, 64] of each record, of prompt and responses.
    """
    table, firsts, found = _table(), dict[int, Signature](), Partners()
    for index, own in enumerate(signatures):
        # A band has two numbers of each side: a bucket holds records that are alike in both.
        both = np.stack([side.reshape(-1, 2) for side in own], axis=1).ravel()[:SIGNATURE_NUMBERS]
        sketch = _sketch(both)
        alike = [
            one for one in table.query(sketch) if ((firsts[one] == own).mean(axis=1) >= SIMILARITY).all()
        ]
        if alike:
            found[index] = min(alike)
        else:
            table.insert(index, sketch)
            firsts[index] = own
    return found


def near_prompts(records: Sequence[Keys], evaluated: Iterable[int], trained: Iterable[int]) -> Partners:
    """Return the evaluation records whose prompt is nearly equal to that of a training record."""
    table, prompts, found = _table(), [record.signatures[0] for record in records], Partners()
    for index in evaluated:
        table.insert(index, _sketch(prompts[index]))
    for index in trained:
        if table.is_empty():
            break
        for other in table.query(_sketch(prompts[index])):
            if (prompts[other] == prompts[index]).mean() >= SIMILARITY:
                found[other] = index
                table.remove(other)
    return dict(sorted(found.items()))


def _table() -> MinHashLSH:
    return MinHashLSH(num_perm=SIGNATURE_NUMBERS, params=(_BANDS, _BAND_NUMBERS))


def _sketch(numbers: npt.NDArray[np.uint32]) -> MinHash:
    sketch = EMPTY_SKETCH.copy()
    sketch.hashvalues = numbers
    return sketch


def opposite(records: Sequence[Keys]) -> Partners:
    """Return each record of which another states the opposite preference, and the first such one."""
    stated: dict[int, int] = {}
    for index, record in enumerate(records):
        for preference, _ in record.preferences:
            stated.setdefault(preference, index)
    return {
        index: stated[other]
        for index, record in enumerate(records)
        for _, other in record.preferences
        if other in stated
    }


class Comparison:
    """The readable records of all sources, compared; about 4 kB each."""

    def __init__(self, sources: Sequence[Source], rules: Rules, config: DataConfig):
        # The parts of a split share no prompt.
        is_split = config.eval_share > 0
        self._rules, self._is_split, self._drops_eval_prompts = rules, is_split, config.drop_eval_prompts
        self._records = [record for source in sources for record in source.keys]
        self._source = [source for source in sources for _ in source.keys]
        self._is_eval = [
            record.is_held_out if is_split else source.is_eval
            for source, record in zip(self._source, self._records, strict=True)
        ]

    def result(self) -> tuple[dict[str, Any], list[Finding]]:
        """Return the numbers of doctor.json about all sources, and the findings."""
        records = self._records
        copies, prompts = equal(one.record for one in records), equal(one.prompt for one in records)
        alike, opposed = near(one.signatures for one in records), opposite(records)
        left, removed, only_near = self._leaks()
        hits = {index: str(one.benchmark) for index, one in enumerate(records) if one.benchmark is not None}
        across = {
            "duplicates": len(copies),
            "near_duplicates": len(alike),
            "clusters": [size + 1 for _, size in Counter(alike.values()).most_common(_SHOWN)],
            "contradictions": len(opposed),
            "repeated_prompts": len(prompts),
            "leaked_prompts": len(left) + len(removed),
            "near_leaked_prompts": len(only_near) + len(left) + len(removed),
            "benchmark_hits": len(hits),
        }
        findings = [
            *self._reported("duplicates", copies),
            *self._near(_without(alike, copies, opposed)),
            *self._reported("contradictions", opposed),
            *self._reported("repeated_prompts", _without(prompts, alike)),
            *self._leak_findings(left, removed, only_near),
            *self._reported(
                "benchmark_overlap",
                {index: index for index in hits},
                [f"{records[index].origin}, {item}" for index, item in hits.items()],
            ),
        ]
        return across, findings

    def _leaks(self) -> tuple[Partners, Partners, Partners]:
        """Return the evaluation records with a prompt of the training data, each with a training record.

        Those whose prompt training keeps, those whose prompt it drops, and those of a nearly equal prompt.
        In two parts of a split equal prompts differ in case at least: they are nearly equal.
        """
        evaluated = [index for index, is_eval in enumerate(self._is_eval) if is_eval]
        trained = [index for index, is_eval in enumerate(self._is_eval) if not is_eval]
        left, removed = Partners(), Partners()
        if not self._is_split:
            # Training compares by `hash`, which does not ignore case.
            hashes = {self._records[index].hash for index in evaluated} if self._drops_eval_prompts else set()
            is_dropped = {index for index in trained if self._records[index].hash in hashes}
            left = self._with_prompt_of(evaluated, (one for one in trained if one not in is_dropped))
            removed = _without(self._with_prompt_of(evaluated, sorted(is_dropped)), left)
        return left, removed, _without(near_prompts(self._records, evaluated, trained), left, removed)

    def _with_prompt_of(self, evaluated: Iterable[int], trained: Iterable[int]) -> Partners:
        """Return each evaluation record with a prompt of these training records, and the first of them."""
        first: dict[tuple[str, int], int] = {}
        for index in trained:
            first.setdefault(("prompt", self._records[index].prompt), index)
            first.setdefault(("hash", self._records[index].hash), index)
        found = Partners()
        for index in evaluated:
            record = self._records[index]
            other = first.get(("prompt", record.prompt), first.get(("hash", record.hash)))
            if other is not None:
                found[index] = other
        return found

    def _leak_findings(self, left: Partners, removed: Partners, only_near: Partners) -> Iterator[Finding]:
        of, leak = sum(self._is_eval), self._rules["train_eval_leak"]
        near_leak = self._rules["near_train_eval_leak"]
        for rule, found in ((leak, left), (near_leak, only_near)):
            yield from rule.count(
                len(found), of, None, self._origins(found.items()), self._other_numbers(found)
            )
        detail = "data.drop_eval_prompts removes it from the training data"
        for finding in leak.count(len(removed), of, None, self._origins(removed.items()), detail):
            yield replace(finding, level=Level.note, remedy="none is needed")

    def _reported(
        self, rule: str, found: Partners, examples: Sequence[str] = (), detail: str = ""
    ) -> Iterator[Finding]:
        """Yield the finding of records with a partner: of their source, or with the count of each source."""
        found = self._within_a_part(found)
        examples = examples or self._origins(found.items())
        counts = Counter(self._source[index] for index in found)
        if len(counts) == 1:
            [source] = counts
            yield from self._rules[rule].count(len(found), len(source.keys), source.label, examples, detail)
        else:
            by_source = ", ".join(f"{count} in {source.label}" for source, count in counts.items())
            detail = "; ".join(filter(None, (by_source, detail)))
            yield from self._rules[rule].count(len(found), len(self._records), None, examples, detail)

    def _within_a_part(self, found: Partners) -> Partners:
        """Leave out records of training and evaluation data in common, which are a leak with its own rule."""
        return {one: other for one, other in found.items() if self._is_eval[one] == self._is_eval[other]}

    def _near(self, found: Partners) -> Iterator[Finding]:
        """Yield the finding of nearly equal records with the largest groups of them."""
        found, groups = self._within_a_part(found), defaultdict[int, list[int]](list)
        for index, first in found.items():
            groups[first].append(index)
        largest = sorted(groups, key=lambda first: (-len(groups[first]), first))[:_SHOWN_CLUSTERS]
        sizes = ", ".join(str(len(groups[first]) + 1) for first in largest)
        detail = f"groups: {len(groups)}, the largest of {sizes} records"
        detail = "; ".join(filter(None, (detail, self._other_numbers(found))))
        members = [(first, *groups[first][: _SHOWN_MEMBERS - 1]) for first in largest]
        yield from self._reported("near_duplicates", found, self._origins(members), detail)

    def _other_numbers(self, found: Mapping[int, int]) -> str:
        """Return how many of the records have other numbers in the prompt than their partner."""
        numbers = [record.numbers for record in self._records]
        count = sum(numbers[one] != numbers[other] for one, other in found.items())
        return f"{count} of them with other numbers in the prompt" if count else ""

    def _origins(self, groups: Iterable[Iterable[int]]) -> list[str]:
        return [", ".join(str(self._records[index].origin) for index in group) for group in groups]


def _without(found: Partners, *others: Partners) -> Partners:
    return {index: other for index, other in found.items() if not any(index in each for each in others)}
