"""The manifest of an encoded source: read back as data, whoever wrote it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.digests import text_digest
from dpo_dist.small_files import read_small

MANIFEST = "manifest.json"
ARRAYS = {
    "ids": np.int32,
    "piece_starts": np.int64,
    "piece_tokens": np.int32,
    "pair_pieces": np.int64,
    "keys": np.uint64,
    "scores": np.float64,
    "trained": np.bool_,
    "mask_starts": np.int64,
    "trained_tokens": np.int32,
    "truncated": np.bool_,
    "prompts": np.uint64,
    "origins": np.int64,
    "outcomes": np.int32,
}
"""Type of each array."""
_MOST_PAIRS = 2**31  # of one record; more would overflow sums


@dataclass(frozen=True)
class Manifest:
    """Description of an encoded source, stored beside its arrays.

    Attributes:
        fingerprint: digest of everything that decides the ids.
        whole: whether the source was read to its end.
        records: number of records read.
        largest_id: of all token ids; -1 if there are none.
        sizes: elements of each array.
        digests: digest of each array's file.
        outcomes: the distinct outcomes of records, each as ``[dropped, pairs, changed, read_as]``; values of
            the array `outcomes` are indices in this list. Former versions have no `read_as`.
        files: the files of examples and bad records, relative to the source's path.
        examples: the first dropped records and the first for each reason, each as
            ``[record index, file index, line, reason, detail]``.
    """

    fingerprint: str
    whole: bool
    records: int
    largest_id: int
    sizes: dict[str, int]
    digests: dict[str, str]
    outcomes: list[tuple[Any, ...]]
    files: list[str]
    examples: list[tuple[int, int, int, str, str]]

    def covers(self, limit: int | None) -> bool:
        """Return whether the first `limit` records (None: all) are encoded."""
        return self.whole or (limit is not None and self.records >= limit)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if it is missing or damaged."""
    try:
        stored = json.loads(read_small(folder / MANIFEST))
        if text_digest(stored["content"]) != stored["digest"]:
            return None
        found = Manifest(**json.loads(stored["content"]))
        return found if _is_manifest(found) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_manifest(found: Manifest) -> bool:
    """Return whether the values of a manifest are of its types: who wrote it is not known."""
    return (
        found.sizes.keys() == found.digests.keys() <= ARRAYS.keys()
        and all(isinstance(size, int) and size >= 0 for size in found.sizes.values())
        and isinstance(found.fingerprint, str)
        and isinstance(found.whole, bool)
        and isinstance(found.records, int)
        and isinstance(found.largest_id, int)
        and all(
            (drop is None or isinstance(drop, str))
            and isinstance(pairs, int)
            and 0 <= pairs < _MOST_PAIRS
            and all(isinstance(n, str) and isinstance(k, int) for n, k in changed)
            and list(map(type, read_as)) in ([], [str])
            for drop, pairs, changed, *read_as in found.outcomes
        )
        and all(isinstance(file, str) for file in found.files)
        and all(list(map(type, example)) == [int, int, int, str, str] for example in found.examples)
        and all(0 <= file < len(found.files) for _, file, *_ in found.examples)
    )
