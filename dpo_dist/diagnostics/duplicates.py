"""Groups of equal and nearly equal records among all sources, from keys and MinHash signatures.

Only numbers are kept of each record: about 600 bytes, most of them in a temporary file.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from dpo_dist.diagnostics.measures.words import SIGNATURE_NUMBERS

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

# 16 bands of 4 numbers: two texts of similarity 0.7 share a band with a probability of 0.99.
_BANDS, _BAND_NUMBERS = 16, 4
_BLOCK = 1 << 14
_PROMPT, _RESPONSES = 0, 1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class SignatureFile:
    """Signatures of all records, uint32 [records, 2, 64], in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self.records = 0

    def add(self, signatures: Signatures) -> None:
        """Append signatures, uint32 [n, 2, 64]."""
        self._file.write(np.ascontiguousarray(signatures, dtype=np.uint32).tobytes())
        self.records += len(signatures)

    def read(self) -> Signatures:
        """Return all signatures, memory-mapped."""
        shape = (self.records, 2, SIGNATURE_NUMBERS)
        if not self.records:
            return np.empty(shape, dtype=np.uint32)
        self._file.flush()
        return np.memmap(self._file, dtype=np.uint32, mode="r", shape=shape)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of records.

    Attributes:
        first: int64 [records], index of the first record in the group of each record.
    """

    first: Indices

    @property
    def later(self) -> Indices:
        """Indices of the records that are not the first of their group, ascending."""
        return np.flatnonzero(self.first != np.arange(len(self.first)))

    def largest(self, count: int) -> list[Indices]:
        """Return the largest groups of several records, the largest first."""
        members, sizes = np.unique(self.first, return_counts=True)
        order = np.argsort(-sizes, kind="stable")[:count]
        return [np.flatnonzero(self.first == members[at]) for at in order if sizes[at] > 1]

    def sizes(self, count: int) -> tuple[int, ...]:
        """Return the sizes of the largest groups of several records."""
        sizes = np.sort(np.unique(self.first, return_counts=True)[1])[::-1]
        return tuple(int(size) for size in sizes[:count] if size > 1)


def equal_groups(keys: Keys) -> Groups:
    """Return groups of records with equal keys, uint64 [records]."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return Groups(first[inverse])


def near_groups(signatures: Signatures, similarity: float) -> Groups:
    """Return groups of records whose prompts and whose responses both have at least that similarity.

    A record is compared with its neighbour and with the first one in each bucket of a locality-sensitive hash
    table of 16 bands (Leskovec, Rajaraman and Ullman: Mining of Massive Datasets, chapter 3), so that a
    record with few similar ones can be missed in a bucket of many others.
    """
    links = [np.empty((0, 2), np.int64)]
    for order, starts in _buckets(signatures, (_PROMPT, _RESPONSES)):
        later = np.flatnonzero(starts != np.arange(len(starts)))
        for other in (later - 1, starts[later]):
            links.append(_similar(signatures, order[later], order[other], similarity, (_PROMPT, _RESPONSES)))
    return _connected(np.concatenate(links), len(signatures))


def near_prompts(signatures: Signatures, is_eval: npt.NDArray[np.bool_], similarity: float) -> Indices:
    """Return the evaluation records whose prompt is nearly equal to that of a training record.

    Args:
        signatures: of all records.
        is_eval: bool [records].
        similarity: least Jaccard similarity of the prompts.

    Returns:
        int64 [found, 2]: the index of the evaluation record, and of one such training record.
    """
    found = [np.empty((0, 2), np.int64)]
    for order, starts in _buckets(signatures, (_PROMPT,)):
        positions = np.arange(len(order))
        trained = np.where(is_eval[order], -1, positions)
        before = np.maximum.accumulate(trained)
        after = np.minimum.accumulate(np.where(is_eval[order], len(order), positions)[::-1])[::-1]
        after = np.minimum(after, len(order) - 1)
        for other in (before, after):
            near = is_eval[order] & (other >= 0) & (starts[other] == starts) & ~is_eval[order[other]]
            ones, others = order[near], order[other[near]]
            found.append(_similar(signatures, ones, others, similarity, (_PROMPT,)))
    pairs = np.concatenate(found)
    return _first_of_each(pairs)


def contradicted(preferences: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the preferences of which another record states the opposite.

    Args:
        preferences: uint64 [preferences, 3]: index of the record, key, key of the opposite.

    Returns:
        int64 [found, 2]: the index of the record, and of one record that states the opposite.
    """
    if not len(preferences):
        return np.empty((0, 2), dtype=np.int64)
    order = np.argsort(preferences[:, 1], kind="stable")
    keys = preferences[order, 1]
    at = np.minimum(np.searchsorted(keys, preferences[:, 2]), len(keys) - 1)
    is_opposed = keys[at] == preferences[:, 2]
    pairs = np.stack([preferences[:, 0], preferences[order[at], 0]], axis=1)[is_opposed].astype(np.int64)
    return _first_of_each(pairs)


def _first_of_each(pairs: Indices) -> Indices:
    """Return one pair for each first index, ascending."""
    kept: Indices = pairs[np.unique(pairs[:, 0], return_index=True)[1]]
    return kept


def _buckets(signatures: Signatures, sides: tuple[int, ...]) -> Iterator[tuple[Indices, Indices]]:
    """Yield for each band the records sorted by bucket, and for each the position of its bucket's first."""
    numbers = _BAND_NUMBERS // len(sides)
    for band in range(_BANDS):
        keys = np.zeros(len(signatures), dtype=np.uint64)
        for side in sides:
            for number in range(band * numbers, (band + 1) * numbers):
                keys = (keys ^ signatures[:, side, number]) * _MULTIPLIER
                keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        is_first = np.ones(len(keys), dtype=np.bool_)
        is_first[1:] = keys[order[1:]] != keys[order[:-1]]
        yield order, np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))


def _similar(
    signatures: Signatures, ones: Indices, others: Indices, similarity: float, sides: tuple[int, ...]
) -> Indices:
    """Return those of the pairs whose estimated similarity is enough on all sides, int64 [similar, 2]."""
    kept = [np.empty((0, 2), np.int64)]
    for start in range(0, len(ones), _BLOCK):
        pairs = np.stack([ones[start : start + _BLOCK], others[start : start + _BLOCK]], axis=1)
        enough = np.ones(len(pairs), dtype=np.bool_)
        for side in sides:
            equal = signatures[pairs[:, 0], side] == signatures[pairs[:, 1], side]
            enough &= equal.mean(axis=1) >= similarity
        kept.append(pairs[enough])
    return np.concatenate(kept)


def _connected(links: Indices, records: int) -> Groups:
    """Return the groups of records that links connect, directly or through others."""
    ones = np.ones(len(links), dtype=np.bool_)
    graph = sparse.coo_matrix((ones, (links[:, 0], links[:, 1])), shape=(records, records))
    _, labels = connected_components(graph, directed=False)
    return equal_groups(labels)
