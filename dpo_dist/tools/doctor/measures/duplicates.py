"""Find equal, nearly equal and opposite records among all sources, by keys and MinHash signatures."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from dpo_dist.config.schema import DataConfig
from dpo_dist.tools.doctor.measures.observe import RecordFacts
from dpo_dist.tools.doctor.measures.sources import ExaminedSource
from dpo_dist.tools.doctor.measures.texts import EMPTY_SKETCH, SIGNATURE_NUMBERS, Signature
from dpo_dist.tools.doctor.rules import DOCTOR_RULES
from dpo_dist.tools.shared.findings import Finding, Level

Partners = dict[int, int]
"""Maps the index of a record to that of a matching record; the keys ascend."""

SIMILARITY = 0.7
# 16 bands of 4 numbers: two texts of similarity 0.7 share a band with a probability of 0.99.
_BANDS, _BAND_NUMBERS = 16, 4


def equal_records(keys: Iterable[int]) -> Partners:
    """Return the records whose key occurs earlier, each with the first record of that key."""
    first: Partners = {}
    return {index: first[key] for index, key in enumerate(keys) if first.setdefault(key, index) != index}


def nearly_equal_records(signatures: Iterable[Signature]) -> Partners:
    """Return the records whose prompt and responses are nearly equal to those of an earlier one.

    `signatures` has uint32 [2, 64] for each record: of its prompt, and of its responses.
    """
    table, firsts, partners = _table(), dict[int, Signature](), Partners()
    for index, sides in enumerate(signatures):
        # A band mixes two numbers of the prompt and two of the responses: records share a bucket only if both
        # are alike.
        sketch = _sketch(
            np.stack([side.reshape(-1, 2) for side in sides], axis=1).ravel()[:SIGNATURE_NUMBERS]
        )
        bucket = table.query(sketch)
        alike = [other for other in bucket if ((firsts[other] == sides).mean(axis=1) >= SIMILARITY).all()]
        if alike:
            partners[index] = min(alike)
        else:
            table.insert(index, sketch)
            firsts[index] = sides
    return partners


def near_prompts(
    records: Sequence[RecordFacts], evaluated: Iterable[int], trained: Iterable[int]
) -> Partners:
    """Return the evaluation records whose prompt is nearly equal to that of a training record."""
    table, prompts, partners = _table(), [record.signatures[0] for record in records], Partners()
    for index in evaluated:
        table.insert(index, _sketch(prompts[index]))
    for index in trained:
        if table.is_empty():
            break
        for other in table.query(_sketch(prompts[index])):
            if (prompts[other] == prompts[index]).mean() >= SIMILARITY:
                partners[other] = index
                table.remove(other)
    return dict(sorted(partners.items()))


def _table() -> MinHashLSH:
    return MinHashLSH(num_perm=SIGNATURE_NUMBERS, params=(_BANDS, _BAND_NUMBERS))


def _sketch(numbers: npt.NDArray[np.uint32]) -> MinHash:
    sketch = EMPTY_SKETCH.copy()
    sketch.hashvalues = numbers
    return sketch


def contradictions(records: Sequence[RecordFacts]) -> Partners:
    """Return each record whose opposite preference is in another record, with the first such record."""
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
    """The readable records of all sources, compared."""

    def __init__(self, sources: Sequence[ExaminedSource], config: DataConfig):
        self._drops_eval_prompts = config.drop_eval_prompts
        self._records = [record for source in sources for record in source.readable]
        self._source = [source for source in sources for _ in source.readable]
        self._is_eval = [
            record.is_held_out or source.is_eval
            for source, record in zip(self._source, self._records, strict=True)
        ]

    def result(self) -> tuple[dict[str, Any], list[Finding]]:
        """Return the section `across` of doctor.json, and the findings."""
        records = self._records
        copies = equal_records(record.record for record in records)
        prompts = equal_records(record.prompt for record in records)
        alike = nearly_equal_records(record.signatures for record in records)
        opposed = contradictions(records)
        evaluated = [index for index, is_eval in enumerate(self._is_eval) if is_eval]
        trained = [index for index, is_eval in enumerate(self._is_eval) if not is_eval]
        first = {records[index].hash: index for index in reversed(trained)}
        leaked = {index: first[records[index].hash] for index in evaluated if records[index].hash in first}
        only_near = _without(near_prompts(records, evaluated, trained), leaked)
        hits = {index: item for index, record in enumerate(records) if (item := record.benchmark) is not None}
        near_copies = self._within_a_part(_without(alike, copies, opposed))
        overlaps = [f"{records[index].origin}, {item}" for index, item in hits.items()]
        across = {
            "duplicates": len(copies),
            "near_duplicates": len(alike),
            "contradictions": len(opposed),
            "repeated_prompts": len(prompts),
            "leaked_prompts": len(leaked),
            "near_leaked_prompts": len(only_near) + len(leaked),
            "benchmark_hits": len(hits),
        }
        findings = [
            *self._partner_findings("duplicates", copies),
            *self._partner_findings("near_duplicates", near_copies, detail=self._other_numbers(near_copies)),
            *self._partner_findings("contradictions", opposed),
            *self._partner_findings("repeated_prompts", _without(prompts, alike)),
            *self._leak_findings("train_eval_leak", leaked),
            *self._leak_findings("near_train_eval_leak", only_near),
            *self._partner_findings("benchmark_overlap", dict(zip(hits, hits, strict=True)), overlaps),
        ]
        return across, findings

    def _leak_findings(self, rule: str, partners: Partners) -> Iterator[Finding]:
        """Yield the finding about evaluation records whose prompts are in training records."""
        is_dropped = rule == "train_eval_leak" and self._drops_eval_prompts
        removed = "data.drop_eval_prompts removes it from the training data"
        detail = removed if is_dropped else self._other_numbers(partners)
        count, origins = DOCTOR_RULES[rule].count, self._origins(partners.items())
        for finding in count(len(partners), sum(self._is_eval), None, origins, detail):
            yield replace(finding, level=Level.note, remedy="none is needed") if is_dropped else finding

    def _partner_findings(
        self, rule: str, partners: Partners, examples: Sequence[str] = (), detail: str = ""
    ) -> Iterator[Finding]:
        """Yield the finding about records with a partner, counted by source if there are several sources."""
        partners = self._within_a_part(partners)
        examples = examples or self._origins(partners.items())
        counts = Counter(self._source[index] for index in partners)
        total, label = len(self._records), None
        if len(counts) == 1:
            [(total, label)] = ((len(source.readable), source.label) for source in counts)
        else:
            by_source = ", ".join(f"{count} in {source.label}" for source, count in counts.items())
            detail = "; ".join(filter(None, (by_source, detail)))
        yield from DOCTOR_RULES[rule].count(len(partners), total, label, examples, detail)

    def _within_a_part(self, partners: Partners) -> Partners:
        """Leave out matches between training and evaluation data, which are leaks and have their own rule."""
        is_eval = self._is_eval
        return {index: other for index, other in partners.items() if is_eval[index] == is_eval[other]}

    def _other_numbers(self, partners: Mapping[int, int]) -> str:
        """Return how many of the records have other numbers in the prompt than their partner."""
        numbers = [record.numbers for record in self._records]
        count = sum(numbers[index] != numbers[other] for index, other in partners.items())
        return f"{count} of them with other numbers in the prompt" if count else ""

    def _origins(self, groups: Iterable[Iterable[int]]) -> list[str]:
        return [", ".join(str(self._records[index].origin) for index in group) for group in groups]


def _without(partners: Partners, *others: Partners) -> Partners:
    return {index: other for index, other in partners.items() if not any(index in each for each in others)}
