"""Find equal, nearly equal and opposite records among all sources, and evaluation prompts in training data.

A record takes about 60 bytes: its keys are in arrays. Near copies are found by datasketch's index of MinHash
signatures (locality-sensitive hashing), in bounded memory.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from dpo_dist.data import DataConfig
from dpo_dist.tools.doctor.measures.observe import RecordFacts
from dpo_dist.tools.doctor.measures.texts import EMPTY_SKETCH, SIGNATURE_NUMBERS, Signature
from dpo_dist.tools.doctor.rules import DOCTOR_RULES, MAX_EXAMPLES
from dpo_dist.tools.findings import Finding, Level

TextKeys = npt.NDArray[np.uint64]

SIMILARITY = 0.7
LIMIT = 100_000
"""So many different signatures are sought; of more a sample."""
_BANDS = (16, 4)
"""16 bands of 4 numbers: two texts of similarity 0.7 share a band with a probability of 0.99."""
_KEYS = 1 << 64


def _sketch(signature: Signature) -> MinHash:
    """Return what the index takes of a signature, uint32 [64] or [sides, 64].

    A band mixes numbers of all sides: signatures share one only if all sides are alike.
    """
    sketch = EMPTY_SKETCH.copy()
    sketch.hashvalues = signature.T.ravel()[:SIGNATURE_NUMBERS]
    return sketch


class _Sought:
    """Signatures by key, each with the first record that is similar to it.

    Of more than `limit` different keys those below `_end` are a sample: all records are compared with it, so
    that its share has no bias. Of two sampled records both would rarely be copies of each other.
    """

    def __init__(self, limit: int = LIMIT):
        self._limit = limit
        self._end = _KEYS
        self.indexes: dict[int, int] = {}  # the first record with each key
        self.matches: dict[int, int] = {}  # the first record after it that is similar, by key
        self._waiting: dict[int, Signature] = {}  # those without a match
        self._bands = MinHashLSH(num_perm=SIGNATURE_NUMBERS, params=_BANDS)

    @property
    def scale(self) -> int:
        """For how many records one that is sought stands; 1: all are sought."""
        return _KEYS // self._end

    def seek(self, key: int, index: int, signature: Signature) -> None:
        """Seek a record's signature from now on, if its key is sampled."""
        if key >= self._end or key in self._waiting:
            return
        self.indexes.setdefault(key, index)
        self._waiting[key] = signature.copy()
        self._bands.insert(key, _sketch(signature), check_duplication=False)
        if len(self.indexes) > self._limit:
            self._end //= 2
            for dropped in [each for each in self.indexes if each >= self._end]:
                self._forget(dropped)
                del self.indexes[dropped]
                self.matches.pop(dropped, None)

    def match(self, index: int, signature: Signature) -> None:
        """Note a record as the match of the signatures that are similar to its own on all sides."""
        keys = self._bands.query(_sketch(signature))
        if not keys:
            return
        similarities = (np.stack([self._waiting[key] for key in keys]) == signature).mean(axis=-1)
        is_similar = (similarities.reshape(len(keys), -1) >= SIMILARITY).all(axis=1)
        for at in np.flatnonzero(is_similar):
            self.matches[keys[at]] = index
            self._forget(keys[at])

    def _forget(self, key: int) -> None:
        if self._waiting.pop(key, None) is not None:
            self._bands.remove(key)


class NearCopies(_Sought):
    """Finds the records that a later one nearly equals in prompt and responses.

    These are as many as nearly equal an earlier one in a group whose records are all alike.
    """

    def __init__(self, limit: int = LIMIT):
        super().__init__(limit)
        self._count = 0

    def add(self, keys: Sequence[int], signatures: Signature) -> None:
        """Add the next records: their keys, and uint32 [records, 2, 64] of their prompts and responses."""
        for key, signature in zip(keys, signatures, strict=True):
            self.match(self._count, signature)
            self.matches.pop(key, None)  # a copy is no near copy: only what comes after the last one counts
            self.seek(key, self._count, signature)
            self._count += 1


class EvaluationPrompts(_Sought):
    """Finds the prompts of evaluation data that nearly equal that of a training record."""

    def add(self, prompts: Iterable[tuple[int, Signature] | None]) -> None:
        """Seek these prompts: the key of each, and uint32 [64]."""
        for key, signature in filter(None, prompts):
            self.seek(key, 0, signature)

    def compare(self, indexes: Iterable[int], signatures: Signature) -> None:
        """Compare the prompts of training records with those that are sought, uint32 [records, 64]."""
        if self.indexes:
            for index, signature in zip(indexes, signatures, strict=True):
                self.match(index, signature)

    def result(self) -> tuple[TextKeys, npt.NDArray[np.int32]]:
        """Return the sorted keys, and the first similar training record of each or -1."""
        keys = np.array(sorted(self.indexes), dtype=np.uint64)
        partners = [self.matches.get(key, -1) for key in keys.tolist()]
        return keys, np.array(partners, dtype=np.int32)


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

    def __init__(
        self,
        config: DataConfig,
        prompts: EvaluationPrompts | None = None,
        near_copies: NearCopies | None = None,
    ):
        self._drops_eval_prompts = config.drop_eval_prompts
        self._prompts = prompts or EvaluationPrompts()
        self._near_copies = near_copies or NearCopies()
        self._labels = list[str]()
        self._source_is_eval = False
        self._files: dict[str, int] = {}
        self._source = array("H")
        self._is_eval = array("B")
        self._file = array("I")
        self._line = array("I")
        self._keys = {name: array("Q") for name in ("record", "prompt", "numbers", "hash", "preferences")}
        self._of_preference = array("i")  # the record of each preference
        self._hits: array[int] = array("i")
        self._items: list[str] = []  # benchmark items of the first hits

    def add_source(self, label: str, *, is_eval: bool) -> None:
        """Begin a source, whose records are added next."""
        self._labels.append(label)
        self._source_is_eval = is_eval

    def add(self, records: Sequence[RecordFacts]) -> None:
        """Add the facts about the next records of the source."""
        start = len(self._source)
        records = [record for record in records if record.is_readable]
        if not records:
            return
        self._source.extend([len(self._labels) - 1] * len(records))
        self._is_eval.extend(record.is_held_out or self._source_is_eval for record in records)
        files = self._files
        self._file.extend(files.setdefault(record.origin.source, len(files)) for record in records)
        self._line.extend(record.origin.line for record in records)
        for name in ("record", "prompt", "numbers", "hash"):
            self._keys[name].extend(getattr(record, name) for record in records)
        for index, record in enumerate(records, start):
            self._keys["preferences"].extend(record.preferences)
            self._of_preference.extend([index] * len(record.preferences))
            if record.benchmark is not None:
                self._hits.append(index)
                if len(self._items) < MAX_EXAMPLES:
                    self._items.append(record.benchmark)
        signatures = np.stack([record.signatures for record in records])
        self._near_copies.add([record.record for record in records], signatures)
        training = np.flatnonzero(np.frombuffer(self._is_eval, np.uint8)[start:] == 0)
        self._prompts.compare((start + training).tolist(), signatures[training, 0])

    def result(self) -> tuple[dict[str, Any], list[Finding]]:
        """Return the section `across` of doctor.json, and the findings; called once, after all records."""
        count = len(self._source)
        copies = equal_records(self._column("record"))
        of_preference = np.frombuffer(self._of_preference, np.int32)
        opposed = contradictions(self._column("preferences"), of_preference, count)
        prompts = self._column("prompt")
        numbers = self._column("numbers")
        near_copies = self._near_copies
        leaked, near_leaked = self._leaks(self._column("hash"), prompts)
        only_near = _without(near_leaked, leaked)
        near = np.full(count, -1, dtype=np.int32)
        for key, later in near_copies.matches.items():
            near[near_copies.indexes[key]] = later
        hits = np.full(count, -1, dtype=np.int32)
        hits[self._hits] = self._hits
        near_only = self._within_a_part(_without(near, opposed))
        near_numbers = _other_numbers(near_only, numbers, near_copies.scale)
        overlaps = [
            f"{self._origin(index)}, {item}" for index, item in zip(self._hits, self._items, strict=False)
        ]
        across: dict[str, Any] = {
            "duplicates": _count(copies),
            "near_duplicates": _count(near) * near_copies.scale + _count(copies),
            "contradictions": _count(opposed),
            "repeated_prompts": _count(equal_records(prompts)),
            "leaked_prompts": _count(leaked),
            "near_leaked_prompts": _count(only_near) * self._prompts.scale + _count(leaked),
            "benchmark_hits": _count(hits),
        }
        findings = [
            *self._partner_findings("duplicates", copies),
            *self._partner_findings("near_duplicates", near_only, (), near_numbers, near_copies.scale),
            *self._partner_findings("contradictions", opposed),
            *self._leak_findings("train_eval_leak", leaked, numbers),
            *self._leak_findings("near_train_eval_leak", only_near, numbers, self._prompts.scale),
            *self._partner_findings("benchmark_overlap", hits, overlaps),
        ]
        return across, findings

    def _column(self, name: str) -> TextKeys:
        """Return the keys of all records, which are in memory only as long as the result."""
        return np.frombuffer(self._keys.pop(name), np.uint64)

    def _leaks(self, hashes: TextKeys, prompts: TextKeys) -> tuple[Partners, Partners]:
        """Return the evaluation records whose prompt equals, and nearly equals, that of a training record."""
        leaked, near = np.full((2, len(hashes)), -1, dtype=np.int32)
        evaluation = np.flatnonzero(self._evaluated)
        shared = np.flatnonzero((first_equal(hashes[evaluation], hashes) >= 0) & ~self._evaluated)
        at = first_equal(hashes[shared], hashes[evaluation])
        leaked[evaluation[at >= 0]] = shared[at[at >= 0]]
        keys, partners = self._prompts.result()
        at = first_equal(keys, prompts[evaluation])
        near[evaluation[at >= 0]] = partners[at[at >= 0]]
        return leaked, near

    @property
    def _evaluated(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._is_eval, np.bool_)

    def _leak_findings(
        self, rule: str, partners: Partners, numbers: TextKeys, scale: int = 1
    ) -> Iterator[Finding]:
        """Yield the finding about evaluation records whose prompts are in training records."""
        is_dropped = rule == "train_eval_leak" and self._drops_eval_prompts
        removed = "data.drop_eval_prompts removes it from the training data"
        detail = removed if is_dropped else _other_numbers(partners, numbers, scale)
        total = int(self._evaluated.sum())
        examples = self._origins(partners)
        for finding in _findings(rule, partners, total, None, examples, detail, scale):
            yield replace(finding, level=Level.note, remedy="none is needed") if is_dropped else finding

    def _partner_findings(
        self,
        rule: str,
        partners: Partners,
        examples: Sequence[str] = (),
        detail: str = "",
        scale: int = 1,
    ) -> Iterator[Finding]:
        """Yield the finding about records with a partner, counted by source if there are several sources."""
        partners = self._within_a_part(partners)
        examples = examples or self._origins(partners)
        sources = np.frombuffer(self._source, np.uint16)
        counts = np.bincount(sources[partners >= 0]).tolist()
        by_source = {at: count * scale for at, count in enumerate(counts) if count}
        total = len(sources)
        label = None
        if len(by_source) == 1:
            [at] = by_source
            total = int((sources == at).sum())
            label = self._labels[at]
        else:
            counts_in_words = ", ".join(f"{count} in {self._labels[at]}" for at, count in by_source.items())
            detail = "; ".join(filter(None, (counts_in_words, detail)))
        yield from _findings(rule, partners, total, label, examples, detail, scale)

    def _within_a_part(self, partners: Partners) -> Partners:
        """Leave out matches between training and evaluation data, which are leaks and have their own rule."""
        is_eval = self._evaluated
        return np.where(is_eval == is_eval[partners], partners, -1)

    def _origins(self, partners: Partners) -> list[str]:
        examples = np.flatnonzero(partners >= 0)[:MAX_EXAMPLES].tolist()
        return [f"{self._origin(index)}, {self._origin(int(partners[index]))}" for index in examples]

    def _origin(self, index: int) -> str:
        return f"{list(self._files)[self._file[index]]}:{self._line[index]}"


def _findings(
    rule: str,
    partners: Partners,
    total: int,
    label: str | None,
    examples: Sequence[str],
    detail: str,
    scale: int,
) -> Iterator[Finding]:
    """Yield the finding about records with a partner, or about their estimated number."""
    if scale > 1:
        detail = "; ".join(filter(None, (f"estimated from one record in {scale}", detail)))
    count = min(_count(partners) * scale, total)
    for finding in DOCTOR_RULES[rule].count(count, total, label, examples, detail):
        yield finding if scale == 1 else replace(finding, text=f"about {finding.text}")


def _count(partners: Indexes) -> int:
    return int((partners >= 0).sum())


def _other_numbers(partners: Partners, numbers: TextKeys, scale: int) -> str:
    """Return how many of the records have other numbers in the prompt than their partner."""
    records = np.flatnonzero(partners >= 0)
    count = int((numbers[records] != numbers[partners[records]]).sum()) * scale
    return f"{count} of them with other numbers in the prompt" if count else ""


def _without(partners: Partners, others: Partners) -> Partners:
    return np.where(others >= 0, np.int32(-1), partners)
