"""Find nearly equal records and prompts by MinHash signatures, in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dpo_dist.tools.doctor.measures.texts import SIGNATURE_NUMBERS, Signature

TextKeys = npt.NDArray[np.uint64]

SIMILARITY = 0.7
LIMIT = 200_000
"""So many different signatures are sought; of more a sample, which has at least half as many."""
# 16 bands of 4 numbers: two texts of similarity 0.7 share a band with a probability of 0.99.
_BANDS, _BAND_NUMBERS = 16, 4
_HASH = np.random.default_rng(0).integers(1 << 64, size=(_BANDS, _BAND_NUMBERS), dtype=np.uint64)
_ROWS_AT_ONCE = 1024
_KEYS = 1 << 64


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


class _Sought:
    """Signatures by key, each with the first record that is similar to it.

    Of more than `limit` different keys those below `_end` are a sample: all records are compared with it, so
    that its share has no bias. Of two sampled records both would rarely be copies of each other.
    """

    def __init__(self, limit: int = LIMIT):
        self._limit, self._end = limit, _KEYS
        self.indexes: dict[int, int] = {}  # the first record with each key
        self.matches: dict[int, int] = {}  # the first record after it that is similar, by key
        self._waiting: dict[int, Signature] = {}  # those without a match
        self._buckets: dict[int, tuple[int, ...]] = {}  # their keys by that of a band

    @property
    def is_sample(self) -> bool:
        """Whether some keys are left out."""
        return self._end < _KEYS

    def seek(self, key: int, index: int, signature: Signature, bands: Sequence[int]) -> None:
        """Seek a record's signature from now on, if its key is sampled."""
        if key >= self._end or key in self._waiting:
            return
        self.indexes.setdefault(key, index)
        self._waiting[key] = signature.copy()
        for band in bands:
            self._buckets[band] = self._buckets.get(band, ()) + (key,)  # noqa: RUF005  (shares the first tuple)
        if len(self.indexes) > self._limit:
            ordered = sorted(self.indexes)
            self._end = ordered[len(ordered) // 2]
            for dropped in ordered[len(ordered) // 2 :]:
                self._forget(dropped)
                del self.indexes[dropped]
                self.matches.pop(dropped, None)

    def match(self, index: int, signature: Signature, bands: Sequence[int]) -> None:
        """Note a record as the match of the signatures that are similar to its own on all sides."""
        keys = list({key for band in bands for key in self._buckets.get(band, ())})
        if keys:
            shares = (np.stack([self._waiting[key] for key in keys]) == signature).mean(axis=2)
            for at in np.flatnonzero((shares >= SIMILARITY).all(axis=1)):
                self.matches[keys[at]] = index
                self._forget(keys[at])

    def _forget(self, key: int) -> None:
        if key in self._waiting:
            [(_, bands)] = _with_bands(self._waiting.pop(key)[None])
            for band in bands:
                if rest := tuple(other for other in self._buckets.pop(band, ()) if other != key):
                    self._buckets[band] = rest


class NearCopies(_Sought):
    """Finds the records that a later one nearly equals in prompt and responses.

    These are as many as nearly equal an earlier one in a group whose records are all alike.
    """

    def __init__(self, limit: int = LIMIT):
        super().__init__(limit)
        self._count = 0

    def add(self, keys: Sequence[int], signatures: Signature) -> None:
        """Add the next records: their keys, and uint32 [records, 2, 64] of their prompts and responses."""
        for key, (signature, bands) in zip(keys, _with_bands(signatures), strict=True):
            self.match(self._count, signature, bands)
            self.matches.pop(key, None)  # a copy is no near copy: only what comes after the last one counts
            self.seek(key, self._count, signature, bands)
            self._count += 1


class EvaluationPrompts(_Sought):
    """Finds the prompts of evaluation data that nearly equal that of a training record."""

    def add(self, prompts: Iterable[tuple[int, Signature] | None]) -> None:
        """Seek these prompts: the key of each, and uint32 [64]."""
        for key, signature in filter(None, prompts):
            [(row, bands)] = _with_bands(signature[None, None])
            self.seek(key, 0, row, bands)

    def compare(self, indexes: Sequence[int], signatures: Signature) -> None:
        """Compare the prompts of training records with those that are sought, uint32 [records, 64]."""
        if self.indexes:
            for index, (row, bands) in zip(indexes, _with_bands(signatures[:, None]), strict=True):
                self.match(index, row, bands)

    def result(self) -> tuple[TextKeys, npt.NDArray[np.int32]]:
        """Return the sorted keys, and the first similar training record of each or -1."""
        keys = np.array(sorted(self.indexes), dtype=np.uint64)
        partners = [self.matches.get(key, -1) for key in keys.tolist()]
        return keys, np.array(partners, dtype=np.int32)
