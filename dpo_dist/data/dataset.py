"""The encoded pairs of a run: those of its sources, one after the other, memory-mapped by all ranks.

Nothing of the size of the dataset is in memory.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import DataConfig
from dpo_dist.data.concatenated import Column, joined
from dpo_dist.data.counts import DataCounts, check_counts
from dpo_dist.data.encoded_source import EncodedSource, Manifest, SourceView, find_damage, read_manifest, view
from dpo_dist.data.micro_batches import ComputeCosts, ExampleSizes, example_sizes
from dpo_dist.data.packing import Sequences, packed_tokens
from dpo_dist.data.records import Origin
from dpo_dist.data.sampler import Indices, Span
from dpo_dist.digests import text_digest
from dpo_dist.errors import DataError

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class PreferenceDataset:
    """Encoded pairs of one list of sources; row = place of a pair in their order.

    A pair has one response (supervised), two (chosen, rejected) or more (a ranking), best first. It is a
    number of pieces: its prompt, then its responses. Pairs of one ranking share the ids of their pieces.

    Attributes:
        fingerprint: digest of everything that decided the ids.
        counts: what became of the records (`DataCounts.as_dict`); under `sources` those of each source.
        source_paths: the files in which pairs were read.
        source_pairs: how many pairs each source has.
        largest_id: no token id in `ids` is above it.
        ids: int32 [tokens].
        piece_starts: int64 [pieces], where each piece starts in `ids`.
        piece_tokens: int32 [pieces], how many tokens it has.
        pair_pieces: int64 [pairs], where the pieces of each pair end.
        keys: uint64 [responses, 2], `encode.response_key` of each response in row order.
        scores: float64 [responses], in the order of `keys`, nan where a record has no scores.
        origins: int64 [pairs, 2], place in `source_paths`, and line.
    """

    fingerprint: str
    counts: dict[str, Any]
    source_paths: tuple[str, ...]
    source_pairs: tuple[int, ...]
    largest_id: int
    ids: Column
    piece_starts: Column
    piece_tokens: Column
    pair_pieces: Column
    keys: Column
    scores: Column
    origins: Column

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
        return [int(tokens) for tokens in self.piece_tokens[first:stop]]

    def sequences(self, row: int, which: Sequence[int] | None = None) -> Sequences:
        """The token ids of a pair; `which` selects some of its responses."""
        first, stop = self._pieces(row)
        starts = map(int, self.piece_starts[first:stop])
        pieces = zip(starts, self.lengths(row), strict=True)
        prompt, *responses = (self.ids[start : start + tokens] for start, tokens in pieces)
        return Sequences(prompt, tuple(responses if which is None else (responses[i] for i in which)))

    def packed_tokens(self, row: int, which: Sequence[int] | None = None) -> int:
        """Tokens that `sequences(row, which)` takes in a packed batch."""
        prompt, *responses = self.lengths(row)
        return packed_tokens(prompt, responses if which is None else [responses[i] for i in which])

    def mean_chosen_tokens(self, rows: Indices) -> float:
        """Mean completion tokens of the chosen responses of these rows."""
        return float(self._piece_tokens(self._first_pieces(rows) + 1).mean())

    def sizes(self, rows: Indices, places: Indices, responses: Indices, costs: ComputeCosts) -> ExampleSizes:
        """What `rows` take with some of their responses, int64 each.

        Args:
            rows: [pairs].
            places: [responses of all pairs], where their keys stand in `keys`, pair after pair.
            responses: [pairs], how many of `places` are of each pair, at least one.
            costs: of the model that computes them.
        """
        pieces = places + np.repeat(rows, responses) + 1
        prompt_tokens = self._piece_tokens(self._first_pieces(rows))
        return example_sizes(prompt_tokens, self._piece_tokens(pieces), responses, costs)

    def response_range(self, row: int) -> range:
        """Where the keys of a pair's responses stand in `keys`."""
        first, stop = self._pieces(row)
        return range(first - row, stop - row - 1)

    def response_counts(self, rows: Indices) -> Indices:
        """How many responses each of `rows` has, int64."""
        counts: Indices = self.pair_pieces[rows] - self._first_pieces(rows) - 1
        return counts

    def response_indices(self, rows: Indices) -> Indices:
        """Where the keys of all responses of `rows` stand in `keys`, int64."""
        counts = self.response_counts(rows)
        starts_in_result = np.cumsum(counts) - counts
        starts = self._first_pieces(rows) - rows
        return np.repeat(starts - starts_in_result, counts) + np.arange(counts.sum())

    def score_gaps(self, rows: Indices | Sequence[int]) -> npt.NDArray[np.float32]:
        """Score of each row's best response minus that of its worst, float32; nan without scores."""
        rows = np.asarray(rows, dtype=np.int64)
        best = self._first_pieces(rows) - rows
        worst = best + self.response_counts(rows) - 1
        gaps: npt.NDArray[np.float32] = (self.scores[best] - self.scores[worst]).astype(np.float32)
        return gaps

    def locate_responses(self, places: Indices) -> tuple[Indices, Indices]:
        """(rows, which) of the responses whose keys stand at `places`, int64 each; O(places log pairs)."""
        lowest, beyond = np.zeros(len(places), dtype=np.int64), np.full(len(places), len(self))
        while (lowest < beyond).any():
            middle = (lowest + beyond) // 2
            ends_before = self._response_ends(np.minimum(middle, len(self) - 1)) <= places
            lowest = np.where(ends_before & (lowest < beyond), middle + 1, lowest)
            beyond = np.where(ends_before, beyond, np.minimum(middle, beyond))
        return lowest, places - np.where(lowest > 0, self._response_ends(np.maximum(lowest - 1, 0)), 0)

    def origin(self, row: int) -> Origin:
        """Where a pair was read."""
        source, line = self.origins[row]
        return Origin(self.source_paths[int(source)], int(line))

    def _response_ends(self, rows: Indices) -> Indices:
        """Where the responses of each of `rows` end in `keys`."""
        ends: Indices = self.pair_pieces[rows] - rows - 1
        return ends

    def _first_pieces(self, rows: Indices) -> Indices:
        if not len(rows):
            return np.empty(0, dtype=np.int64)
        return np.where(rows > 0, self.pair_pieces[np.maximum(rows - 1, 0)], 0)

    def _piece_tokens(self, pieces: Indices) -> Indices:
        return np.asarray(self.piece_tokens[pieces], dtype=np.int64)

    def _pieces(self, row: int) -> tuple[int, int]:
        return (int(self.pair_pieces[row - 1]) if row else 0), int(self.pair_pieces[row])


def open_dataset(sources: Sequence[EncodedSource], config: DataConfig) -> PreferenceDataset:
    """Map what `prepare_dataset` gave. Digests are verified; a file is read for it only if it has changed.

    Raises:
        DataError: a file is damaged, more was dropped than `data.max_bad_share` allows, or nothing is left.
    """
    manifests = [_verified(source) for source in sources]
    views = list(map(view, sources, manifests))
    counts = DataCounts()
    told = []
    for source, seen in zip(sources, views, strict=True):
        check_counts(seen.counts, source.path, config)
        told.append({"path": source.path, **seen.counts.numbers()})
        counts.add(seen.counts)
    parts = [
        [manifest.fingerprint, source.limit] for source, manifest in zip(sources, manifests, strict=True)
    ]
    return PreferenceDataset(
        fingerprint=text_digest(json.dumps(parts)),
        counts=counts.as_dict() | {"sources": told},
        source_paths=tuple(file for seen in views for file in seen.files),
        source_pairs=tuple(seen.pairs for seen in views),
        largest_id=max(manifest.largest_id for manifest in manifests),
        ids=_join(views, "ids"),
        piece_starts=_join(views, "piece_starts", [len(seen.arrays["ids"]) for seen in views]),
        piece_tokens=_join(views, "piece_tokens"),
        pair_pieces=_join(views, "pair_pieces", [len(seen.arrays["piece_starts"]) for seen in views]),
        keys=_join(views, "keys"),
        scores=_join(views, "scores"),
        origins=_join(views, "origins", [np.array([len(seen.files), 0]) for seen in views]),
    )


def _verified(source: EncodedSource) -> Manifest:
    manifest = read_manifest(source.folder)
    damaged = ["manifest"] if manifest is None else find_damage(source.folder, manifest)
    if manifest is None or damaged:
        raise DataError(
            "the encoded data are damaged",
            where=str(source.folder),
            got=", ".join(damaged),
            remedy="start again: what is damaged is encoded anew",
        )
    return manifest


def _join(views: Sequence[SourceView], name: str, steps: Sequence[Any] | None = None) -> Column:
    """An array of all sources; `steps` is by how much a source raises the values of those after it."""
    parts = [seen.arrays[name] for seen in views]
    return joined(parts, None if steps is None else [sum(steps[:number], 0) for number in range(len(parts))])
