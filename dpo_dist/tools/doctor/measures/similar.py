"""Find nearly equal records and prompts by MinHash signatures, in bounded memory."""

import itertools
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
"""So many different records, at least half of it, are sampled if there are more than `EXACT`."""
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
    """Signatures that are sought, by key; of more than `limit` the half with the smaller keys, a sample."""

    def __init__(self, limit: int):
        self._limit, self._end, self.is_sample = limit, 1 << 64, False
        self.indexes: dict[int, int] = {}  # the first record with each sampled key, which is below `_end`
        self._sought: dict[int, Signature] = {}
        self._buckets: dict[int, tuple[int, ...]] = {}  # keys by that of a band

    def similar(self, signature: Signature, bands: Sequence[int]) -> list[int]:
        """Return the keys of the sought signatures that are similar to this one on all sides."""
        keys = list({key for band in bands for key in self._buckets.get(band, ())})
        if not keys:
            return []
        shares = (np.stack([self._sought[key] for key in keys]) == signature).mean(axis=2)
        return [keys[at] for at in np.flatnonzero((shares >= SIMILARITY).all(axis=1))]

    def seek(self, key: int, index: int, signature: Signature, bands: Sequence[int]) -> None:
        """Seek a record's signature from now on, if its key is sampled."""
        if key >= self._end or key in self._sought:
            return
        self.indexes.setdefault(key, index)
        self._sought[key] = signature.copy()
        for band in bands:
            self._buckets[band] = self._buckets.get(band, ()) + (key,)  # noqa: RUF005  (shares the first tuple)
        if len(self.indexes) > self._limit:
            ordered = sorted(self.indexes)
            self._end, self.is_sample = ordered[len(ordered) // 2], True
            for dropped in ordered[len(ordered) // 2 :]:
                self.found(dropped)
                del self.indexes[dropped]

    def found(self, key: int) -> None:
        """Seek this signature no longer."""
        if key in self._sought:
            [(_, bands)] = _with_bands(self._sought.pop(key)[None])
            for band in bands:
                if rest := tuple(other for other in self._buckets.pop(band, ()) if other != key):
                    self._buckets[band] = rest


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
        self._exact, self._count = exact, 0
        self._waiting = list[tuple[Sequence[int], Signature]]()  # what may become a sample
        self._sample, self._drawn = _Sketches(sampled), 0
        self._later: dict[int, int] = {}  # index of the record that nearly equals that of a sampled key

    def add(self, keys: Sequence[int], signatures: Signature) -> None:
        """Add the next records: their keys, and uint32 [records, 2, 64] of their prompts and responses."""
        self._waiting.append((keys, signatures))
        self._count += len(keys)
        if self._count > self._exact:
            for chunk in self._waiting:
                self._draw(*chunk)
            self._waiting.clear()

    def _draw(self, keys: Sequence[int], signatures: Signature) -> None:
        for key, (signature, bands) in zip(keys, _with_bands(signatures), strict=True):
            for other in self._sample.similar(signature, bands):
                self._later[other] = self._drawn
                self._sample.found(other)
            self._later.pop(key, None)
            self._sample.seek(key, self._drawn, signature, bands)
            self._drawn += 1

    def result(self) -> NearCopies:
        """Return the near copies."""
        if self._count > self._exact:
            first = self._sample.indexes
            partners = {first[key]: other for key, other in self._later.items() if key in first}
            return NearCopies(dict(sorted(partners.items())), sorted(first.values()))
        partners, firsts = {}, _Sketches(self._count)
        chunks = (_with_bands(signatures) for _, signatures in self._waiting)
        for index, (signature, bands) in enumerate(itertools.chain.from_iterable(chunks)):
            if alike := firsts.similar(signature, bands):
                partners[index] = min(alike)
            else:
                firsts.seek(index, index, signature, bands)
        return NearCopies(partners, None)


class EvaluationPrompts:
    """Finds the prompts of evaluation data that nearly equal that of a training record.

    Of more than `limit` different prompts a sample is sought.
    """

    def __init__(self, limit: int = EXACT):
        self._sketches = _Sketches(limit)
        self._partners: dict[int, int] = {}

    def add(self, prompts: Iterable[tuple[int, Signature] | None]) -> None:
        """Seek these prompts: the key of each, and uint32 [64]."""
        for key, signature in filter(None, prompts):
            [(row, bands)] = _with_bands(signature[None, None])
            self._sketches.seek(key, 0, row, bands)

    def compare(self, indexes: Sequence[int], signatures: Signature) -> None:
        """Compare the prompts of training records with those that are sought, uint32 [records, 64]."""
        if self._sketches.indexes:
            for index, (row, bands) in zip(indexes, _with_bands(signatures[:, None]), strict=True):
                for key in self._sketches.similar(row, bands):
                    self._partners[key] = index
                    self._sketches.found(key)

    def result(self) -> tuple[TextKeys, npt.NDArray[np.int32], bool]:
        """Return the sorted keys, the first similar training record of each or -1, and if it is a sample."""
        keys = np.array(sorted(self._sketches.indexes), dtype=np.uint64)
        partners = [self._partners.get(key, -1) for key in keys.tolist()]
        return keys, np.array(partners, dtype=np.int32), self._sketches.is_sample
