"""Find nearly equal records and prompts by MinHash signatures, in bounded memory."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_dist.tools.doctor.measures.texts import SIGNATURE_NUMBERS, Signature

TextKeys = npt.NDArray[np.uint64]

SIMILARITY = 0.7
EXACT = 200_000
"""All records, and all different prompts of evaluation data, are compared if there are no more than this."""
SAMPLED = 100_000
"""So many different records are sampled if there are more than `EXACT`."""
# 16 bands of 4 numbers: two texts of similarity 0.7 share a band with a probability of 0.99.
_BANDS, _BAND_NUMBERS = 16, 4
_HASH = np.random.default_rng(0).integers(1 << 64, size=(_BANDS, _BAND_NUMBERS), dtype=np.uint64)
_ROWS_AT_ONCE = 1024


def _with_bands(signatures: Signature) -> Iterator[tuple[Signature, list[int]]]:
    """Yield each signature, uint32 [sides, 64], with the keys of its bands.

    A band mixes numbers of all sides: signatures share a bucket only if all sides are alike.
    """
    for start in range(0, len(signatures), _ROWS_AT_ONCE):
        block = signatures[start : start + _ROWS_AT_ONCE]
        count, sides, _ = block.shape
        mixed = block.reshape(count, sides, -1, _BAND_NUMBERS // sides).swapaxes(1, 2).reshape(count, -1)
        bands = mixed[:, :SIGNATURE_NUMBERS].reshape(count, _BANDS, _BAND_NUMBERS)
        yield from zip(block, (bands * _HASH).sum(axis=2).tolist(), strict=True)


class _Sketches:
    """At most `limit` signatures, those with the smallest keys, and the buckets of those that are sought."""

    def __init__(self, limit: int, sides: int):
        self._limit, self.has_dropped = limit, False
        # Memory is taken only for the rows that are written.
        self._signatures = np.empty((limit, sides, SIGNATURE_NUMBERS), dtype=np.uint32)
        self.keys: list[int] = []  # of each row
        self.indexes: list[int] = []  # of each row: the first record with this key
        self._rows: dict[int, int] = {}
        self._largest: list[int] = []  # a heap of the negative keys
        self._sought = set[int]()  # rows
        self._buckets: dict[int, tuple[int, ...]] = {}  # rows by the key of a band

    def similar(self, signature: Signature, bands: Sequence[int]) -> list[int]:
        """Return the keys of the sought signatures that are similar to this one on all sides."""
        rows = list({row for band in bands for row in self._buckets.get(band, ())})
        if not rows:
            return []
        shares = (self._signatures[rows] == signature).mean(axis=2)
        return [self.keys[rows[at]] for at in np.flatnonzero((shares >= SIMILARITY).all(axis=1))]

    def seek(self, key: int, index: int, signature: Signature, bands: Sequence[int]) -> None:
        """Seek a record's signature from now on; if there are too many, drop that with the largest key."""
        row = self._rows.get(key)
        if row is None:
            row = len(self.keys)
            if row < self._limit:
                heapq.heappush(self._largest, -key)
                self.keys.append(key)
                self.indexes.append(index)
            else:
                self.has_dropped = True
                dropped = -heapq.heappushpop(self._largest, -key)
                if dropped == key:
                    return
                self.found(dropped)
                row = self._rows.pop(dropped)
                self.keys[row], self.indexes[row] = key, index
            self._rows[key], self._signatures[row] = row, signature
        elif row in self._sought:
            return
        self._sought.add(row)
        for band in bands:
            self._buckets[band] = self._buckets.get(band, ()) + (row,)  # noqa: RUF005  (shares the first tuple)

    def found(self, key: int) -> None:
        """Seek this signature no longer."""
        row = self._rows[key]
        if row in self._sought:
            self._sought.remove(row)
            [(_, bands)] = _with_bands(self._signatures[row : row + 1])
            for band in bands:
                if rows := tuple(other for other in self._buckets.pop(band, ()) if other != row):
                    self._buckets[band] = rows


class NearCopies(NamedTuple):
    """Records that nearly equal another one: indexes of both."""

    partners: dict[int, int]
    sampled: list[int] | None  # the records that were looked at; None: all


class NearCopyFinder:
    """Finds the records whose prompt and responses nearly equal those of an earlier one.

    Of more than `exact` records it samples different ones, by their keys, and finds those that a later record
    nearly equals, which are as many in a group of nearly equal records. All records are compared with the
    sample, so that its share has no bias: of two sampled records both would rarely be copies of each other.
    """

    def __init__(self, exact: int = EXACT, sampled: int = SAMPLED):
        self._sampled, self._count = sampled, 0
        self._keys: list[int] = []
        self._signatures = np.empty((exact, 2, SIGNATURE_NUMBERS), dtype=np.uint32)
        self._sample: _Sketches | None = None
        self._later: dict[int, int] = {}  # index of the record that nearly equals that of a sampled key

    def add(self, keys: Sequence[int], signatures: Signature) -> None:
        """Add the next records: their keys, and uint32 [records, 2, 64] of their prompts and responses."""
        start, stop = self._count, self._count + len(keys)
        self._count = stop
        if stop <= len(self._signatures):
            self._signatures[start:stop] = signatures
            self._keys += keys
            return
        if self._sample is None:
            self._sample = _Sketches(self._sampled, 2)
            self._draw(self._sample, 0, self._keys, self._signatures[:start])
            self._keys, self._signatures = [], self._signatures[:0].copy()
        self._draw(self._sample, start, keys, signatures)

    def _draw(self, sample: _Sketches, start: int, keys: Sequence[int], signatures: Signature) -> None:
        rows = zip(keys, _with_bands(signatures), strict=True)
        for index, (key, (signature, bands)) in enumerate(rows, start):
            for other in sample.similar(signature, bands):
                self._later[other] = index
                sample.found(other)
            self._later.pop(key, None)
            sample.seek(key, index, signature, bands)

    def result(self) -> NearCopies:
        """Return the near copies."""
        if self._sample is not None:
            first = dict(zip(self._sample.keys, self._sample.indexes, strict=True))
            partners = {first[key]: other for key, other in self._later.items() if key in first}
            return NearCopies(dict(sorted(partners.items())), sorted(first.values()))
        partners, firsts = {}, _Sketches(self._count, 2)
        for index, (signature, bands) in enumerate(_with_bands(self._signatures[: self._count])):
            if alike := firsts.similar(signature, bands):
                partners[index] = min(alike)
            else:
                firsts.seek(index, index, signature, bands)
        return NearCopies(partners, None)


class EvaluationPrompts:
    """Finds the prompts of evaluation data that nearly equal that of a training record.

    Of more than `limit` different prompts those with the smallest keys are sought.
    """

    def __init__(self, limit: int = EXACT):
        self._sketches = _Sketches(limit, 1)
        self._partners: dict[int, int] = {}

    def add(self, prompts: Iterable[tuple[int, Signature]]) -> None:
        """Seek these prompts: the key of each, and uint32 [64]."""
        for key, signature in prompts:
            [(row, bands)] = _with_bands(signature[None, None])
            self._sketches.seek(key, 0, row, bands)

    def compare(self, indexes: Sequence[int], signatures: Signature) -> None:
        """Compare the prompts of training records with those that are sought, uint32 [records, 64]."""
        if self._sketches.keys:
            for index, (row, bands) in zip(indexes, _with_bands(signatures[:, None]), strict=True):
                for key in self._sketches.similar(row, bands):
                    self._partners[key] = index
                    self._sketches.found(key)

    def result(self) -> tuple[TextKeys, npt.NDArray[np.int32], bool]:
        """Return the sorted keys, the first similar training record of each or -1, and if it is a sample."""
        keys = np.sort(np.array(self._sketches.keys, dtype=np.uint64))
        partners = [self._partners.get(key, -1) for key in keys.tolist()]
        return keys, np.array(partners, dtype=np.int32), self._sketches.has_dropped
