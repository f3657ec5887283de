"""Encoded pairs on disk, memory-mapped: written once by one process, opened by all, found again by content.

A folder holds flat arrays: token ids piece after piece (a pair's prompt, then its responses), where each
piece ends, how many pieces each pair has, a content key and a score for every response, and where each pair
came from. Nothing of the size of the data set lives in memory.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import DataConfig
from dpo_dist.data.pack import Sequences, packed_tokens
from dpo_dist.data.plan import ComputeCosts, PairSizes, pair_sizes
from dpo_dist.data.records import Origin
from dpo_dist.data.schedule import Rows, Span
from dpo_dist.errors import DataError

MANIFEST = "manifest.json"
ARRAYS = {
    "ids": np.int32,
    "piece_ends": np.int64,
    "pair_pieces": np.int64,
    "keys": np.uint64,
    "scores": np.float64,
    "origins": np.int64,
}

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class PairDataset:
    """Encoded pairs of one list of sources; row = place of a pair in their order.

    A pair has one response (supervised), two (chosen, rejected) or more (a ranking), best first.

    Attributes:
        folder: where the arrays lie.
        fingerprint: digest of everything that decided the ids.
        counts: what became of the records (`DataCounts.as_dict`).
        keys: uint64 [responses, 2], `encode.response_key` of each response in row order.
        scores: float64 [responses], in the order of `keys`, nan where a record has no scores.
    """

    folder: Path
    fingerprint: str
    counts: dict[str, Any]
    source_paths: tuple[str, ...]
    source_pairs: tuple[int, ...]
    ids: npt.NDArray[np.int32]
    piece_ends: npt.NDArray[np.int64]
    pair_pieces: npt.NDArray[np.int64]
    keys: Keys
    scores: npt.NDArray[np.float64]
    origins: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pair_pieces)

    def spans(self, weights: Sequence[float]) -> list[Span]:
        """The rows of each source with its weight."""
        ends = list(itertools.accumulate(self.source_pairs))
        return [
            Span(stop - pairs, stop, weight)
            for stop, pairs, weight in zip(ends, self.source_pairs, weights, strict=True)
        ]

    def lengths(self, row: int) -> list[int]:
        """Tokens of a pair's pieces: prompt, response, response, ..."""
        first, stop = self._pieces(row)
        bounds = [int(self.piece_ends[first - 1]) if first else 0, *map(int, self.piece_ends[first:stop])]
        return [end - start for start, end in itertools.pairwise(bounds)]

    def sequences(self, row: int, which: Sequence[int] | None = None) -> Sequences:
        """The token ids of a pair; `which` selects some of its responses."""
        first, _ = self._pieces(row)
        start = int(self.piece_ends[first - 1]) if first else 0
        pieces = []
        for length in self.lengths(row):
            pieces.append(self.ids[start : start + length])
            start += length
        prompt, *responses = pieces
        return Sequences(prompt, tuple(responses if which is None else (responses[i] for i in which)))

    def packed_tokens(self, row: int, which: Sequence[int] | None = None) -> int:
        """Tokens that `sequences(row, which)` takes in a packed batch."""
        prompt, *responses = self.lengths(row)
        return packed_tokens(prompt, responses if which is None else [responses[i] for i in which])

    def mean_chosen_tokens(self, rows: Rows) -> float:
        """Mean completion tokens of the chosen responses of these rows."""
        return float(self._piece_tokens(self._first_pieces(rows) + 1).mean())

    def sizes(self, rows: Rows, places: Rows, responses: Rows, costs: ComputeCosts) -> PairSizes:
        """What `rows` take with some of their responses, int64 each.

        Args:
            rows: [pairs].
            places: [responses of all pairs], where their keys stand in `keys`, pair after pair.
            responses: [pairs], how many of `places` are of each pair, at least one.
            costs: of the model that computes them.
        """
        pieces = places + np.repeat(rows, responses) + 1
        prompt_tokens = self._piece_tokens(self._first_pieces(rows))
        return pair_sizes(prompt_tokens, self._piece_tokens(pieces), responses, costs)

    def response_rows(self, row: int) -> range:
        """Where the keys of a pair's responses stand in `keys`."""
        first, stop = self._pieces(row)
        return range(first - row, stop - row - 1)

    def response_counts(self, rows: Rows) -> Rows:
        """How many responses each of `rows` has, int64."""
        return self.pair_pieces[rows] - self._first_pieces(rows) - 1

    def response_places(self, rows: Rows) -> Rows:
        """Where the keys of all responses of `rows` stand in `keys`, int64."""
        counts = self.response_counts(rows)
        starts_in_result = np.cumsum(counts) - counts
        starts = self._first_pieces(rows) - rows
        return np.repeat(starts - starts_in_result, counts) + np.arange(counts.sum())

    def score_gaps(self, rows: Rows | Sequence[int]) -> npt.NDArray[np.float32]:
        """Score of each row's best response minus that of its worst, float32; nan without scores."""
        rows = np.asarray(rows, dtype=np.int64)
        best = self._first_pieces(rows) - rows
        worst = best + self.response_counts(rows) - 1
        gaps: npt.NDArray[np.float32] = (self.scores[best] - self.scores[worst]).astype(np.float32)
        return gaps

    def rows_of_responses(self, places: Rows) -> tuple[Rows, Rows]:
        """(rows, which) of the responses whose keys stand at `places`, int64 each."""
        stops = self.pair_pieces - np.arange(len(self)) - 1
        rows = np.searchsorted(stops, places, side="right")
        return rows, places - np.where(rows > 0, stops[rows - 1], 0)

    def origin(self, row: int) -> Origin:
        """Where a pair was read."""
        source, line = self.origins[row]
        return Origin(self.source_paths[int(source)], int(line))

    def _first_pieces(self, rows: Rows) -> Rows:
        return np.where(rows > 0, self.pair_pieces[rows - 1], 0)

    def _piece_tokens(self, pieces: Rows) -> Rows:
        return self.piece_ends[pieces] - np.where(pieces > 0, self.piece_ends[pieces - 1], 0)

    def _pieces(self, row: int) -> tuple[int, int]:
        return (int(self.pair_pieces[row - 1]) if row else 0), int(self.pair_pieces[row])


def open_dataset(folder: Path, config: DataConfig) -> PairDataset:
    """Map a folder written by `prepare_dataset`; reads no ids.

    Raises:
        DataError: more was dropped than `data.max_bad_share` allows, or nothing is left.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    counts = manifest["counts"]
    _check_counts(counts, config)
    arrays = {name: _map(folder, name, manifest["sizes"][name]) for name in ARRAYS}
    return PairDataset(
        folder=folder,
        fingerprint=manifest["fingerprint"],
        counts=counts,
        source_paths=tuple(manifest["source_paths"]),
        source_pairs=tuple(manifest["source_pairs"]),
        ids=arrays["ids"],
        piece_ends=arrays["piece_ends"],
        pair_pieces=arrays["pair_pieces"],
        keys=arrays["keys"].reshape(-1, 2),
        scores=arrays["scores"],
        origins=arrays["origins"].reshape(-1, 2),
    )


def _map(folder: Path, name: str, size: int) -> npt.NDArray[Any]:
    return np.memmap(folder / f"{name}.bin", dtype=ARRAYS[name], mode="r", shape=(size,))


def _check_counts(counts: dict[str, Any], config: DataConfig) -> None:
    dropped = sum(counts["dropped"].values())
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts["dropped"].items()))
    examples = "; ".join(counts["examples"][:5])
    if counts["kept"] == 0:
        raise DataError(
            "no usable record was read",
            where=examples or "data.train",
            got=f"{counts['read']} records; dropped: {reasons or 'none'}",
            remedy="check the files and the record format; docs/data.md lists the formats and reasons",
        )
    if dropped > config.max_bad_share * counts["read"]:
        raise DataError(
            f"{dropped} of {counts['read']} records cannot be used",
            where=examples,
            got=reasons,
            expected=f"at most a share of {config.max_bad_share} (data.max_bad_share)",
            remedy="mend the records, or raise data.max_bad_share if this loss is meant",
        )


def is_complete(folder: Path) -> bool:
    """Whether every array has the size that the manifest promises."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(
            (folder / f"{name}.bin").stat().st_size == manifest["sizes"][name] * np.dtype(dtype).itemsize
            for name, dtype in ARRAYS.items()
        )
    except (OSError, ValueError, KeyError):
        return False
