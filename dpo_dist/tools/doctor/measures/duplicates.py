"""Find equal and opposite records among all sources, and evaluation prompts in training data.

A record takes about 50 bytes: its keys are in arrays.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.data import DataConfig
from dpo_dist.tools.doctor.measures.observe import RecordFacts
from dpo_dist.tools.doctor.rules import DOCTOR_RULES, MAX_EXAMPLES
from dpo_dist.tools.findings import Finding, Level

TextKeys = npt.NDArray[np.uint64]
Indexes = npt.NDArray[np.int32]
Partners = Indexes
"""The index of a matching record for each record, int32 [records]; -1: there is none."""


def equal_records(keys: TextKeys) -> Partners:
    """Return for each record whose key occurs earlier the first record of that key."""
    _, firsts, numbers = np.unique(keys, return_index=True, return_inverse=True)
    partners = firsts.astype(np.int32)[numbers]
    return np.where(partners == np.arange(len(keys), dtype=np.int32), np.int32(-1), partners)


def first_equal(keys: TextKeys, sought: TextKeys) -> Indexes:
    """Return the place of the first of the keys that equals each sought one; -1: none does."""
    different, firsts = np.unique(keys, return_index=True)
    if not len(different):
        return np.full(len(sought), -1, dtype=np.int32)
    at = np.searchsorted(different[:-1], sought)  # what is above all is compared with the last
    return np.where(different[at] == sought, firsts.astype(np.int32)[at], np.int32(-1))


def contradictions(preferences: TextKeys, of_record: Indexes, count: int) -> Partners:
    """Return for each record whose opposite preference is in another record the first such record.

    `preferences` has the keys of all records' preferences, `of_record` the index of each key's record, below
    `count`. The opposite of a preference differs from it in the lowest bit.
    """
    ordered = np.sort(preferences)
    opposed = ordered[:-1][ordered[:-1] ^ ordered[1:] == 1]
    is_opposed = first_equal(opposed, preferences & ~np.uint64(1)) >= 0
    preferences = preferences[is_opposed]
    of_record = of_record[is_opposed]
    partners = np.full(count, -1, dtype=np.int32)
    partners[of_record] = of_record[first_equal(preferences, preferences ^ np.uint64(1))]
    return partners


class Comparison:
    """Compares the readable records of all sources, added in order."""

    def __init__(self, config: DataConfig):
        self._drops_eval_prompts = config.drop_eval_prompts
        self._labels = list[str]()
        self._source_is_eval = False
        self._files: dict[str, int] = {}
        self._source = array("H")
        self._is_eval = array("B")
        self._file = array("I")
        self._line = array("I")
        self._keys = {name: array("Q") for name in ("record", "prompt", "hash", "preferences")}
        self._of_preference = array("i")  # the record of each preference

    def add_source(self, label: str, *, is_eval: bool) -> None:
        """Begin a source, whose records are added next."""
        self._labels.append(label)
        self._source_is_eval = is_eval

    def add(self, records: Sequence[RecordFacts]) -> None:
        """Add the facts about the next records of the source."""
        start = len(self._source)
        records = [record for record in records if record.is_readable]
        self._source.extend([len(self._labels) - 1] * len(records))
        self._is_eval.extend(record.is_held_out or self._source_is_eval for record in records)
        files = self._files
        self._file.extend(files.setdefault(record.origin.source, len(files)) for record in records)
        self._line.extend(record.origin.line for record in records)
        for name in ("record", "prompt", "hash"):
            self._keys[name].extend(getattr(record, name) for record in records)
        for index, record in enumerate(records, start):
            self._keys["preferences"].extend(record.preferences)
            self._of_preference.extend([index] * len(record.preferences))

    def result(self) -> tuple[dict[str, Any], list[Finding]]:
        """Return the section `across` of doctor.json, and the findings; called once, after all records."""
        copies = equal_records(self._column("record"))
        of_preference = np.frombuffer(self._of_preference, np.int32)
        opposed = contradictions(self._column("preferences"), of_preference, len(self._source))
        leaked = self._leaks(self._column("hash"))
        across: dict[str, Any] = {
            "duplicates": _count(copies),
            "contradictions": _count(opposed),
            "repeated_prompts": _count(equal_records(self._column("prompt"))),
            "leaked_prompts": _count(leaked),
        }
        findings = [
            *self._partner_findings("duplicates", copies),
            *self._partner_findings("contradictions", opposed),
            *self._leak_findings(leaked),
        ]
        return across, findings

    def _column(self, name: str) -> TextKeys:
        """Return the keys of all records, which are in memory only as long as the result."""
        return np.frombuffer(self._keys.pop(name), np.uint64)

    def _leaks(self, hashes: TextKeys) -> Partners:
        """Return the evaluation records whose prompt equals that of a training record."""
        leaked = np.full(len(hashes), -1, dtype=np.int32)
        evaluation = np.flatnonzero(self._evaluated)
        shared = np.flatnonzero((first_equal(hashes[evaluation], hashes) >= 0) & ~self._evaluated)
        at = first_equal(hashes[shared], hashes[evaluation])
        leaked[evaluation[at >= 0]] = shared[at[at >= 0]]
        return leaked

    @property
    def _evaluated(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._is_eval, np.bool_)

    def _leak_findings(self, leaked: Partners) -> Iterator[Finding]:
        """Yield the finding about evaluation records whose prompts are in training records."""
        removed = "data.drop_eval_prompts removes it from the training data" * self._drops_eval_prompts
        rule = DOCTOR_RULES["train_eval_leak"]
        total = int(self._evaluated.sum())
        for finding in rule.count(_count(leaked), total, None, self._origins(leaked), removed):
            yield replace(finding, level=Level.note, remedy="none is needed") if removed else finding

    def _partner_findings(self, rule: str, partners: Partners) -> Iterator[Finding]:
        """Yield the finding about records with a partner, counted by source if there are several sources.

        Matches between training and evaluation data are leaks, which have their own rule.
        """
        is_eval = self._evaluated
        partners = np.where(is_eval == is_eval[partners], partners, -1)
        sources = np.frombuffer(self._source, np.uint16)
        counts = np.bincount(sources[partners >= 0]).tolist()
        by_source = {at: count for at, count in enumerate(counts) if count}
        total = len(sources)
        label = None
        detail = ""
        if len(by_source) == 1:
            [at] = by_source
            total = int((sources == at).sum())
            label = self._labels[at]
        else:
            detail = ", ".join(f"{count} in {self._labels[at]}" for at, count in by_source.items())
        yield from DOCTOR_RULES[rule].count(_count(partners), total, label, self._origins(partners), detail)

    def _origins(self, partners: Partners) -> list[str]:
        examples = np.flatnonzero(partners >= 0)[:MAX_EXAMPLES].tolist()
        return [f"{self._origin(index)}, {self._origin(int(partners[index]))}" for index in examples]

    def _origin(self, index: int) -> str:
        return f"{list(self._files)[self._file[index]]}:{self._line[index]}"


def _count(partners: Indexes) -> int:
    return int((partners >= 0).sum())
