"""Encoded pairs on disk, memory-mapped: written once by one process, opened by all, found again by content.

A folder holds flat arrays: token ids piece after piece (a pair's prompt, then its responses), where each
piece ends, how many pieces each pair has, a content key for every response, and where each pair came from.
Nothing of the size of the data set lives in memory.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import staged_folder, write_text
from dpo_dist.config.schema import DataConfig, OnBadRecord, SourceConfig
from dpo_dist.data.encode import EncodedPair, encode_pair
from dpo_dist.data.files import source_identity
from dpo_dist.data.formats import read_records
from dpo_dist.data.pack import Ids, Sequences, packed_tokens
from dpo_dist.data.records import BadRecord, Origin
from dpo_dist.data.schedule import Rows, Span
from dpo_dist.errors import DataError

_LAYOUT_VERSION = 1
_MANIFEST = "manifest.json"
_SHOWN_EXAMPLES = 20
_DTYPES = {
    "ids": np.int32,
    "piece_ends": np.int64,
    "pair_pieces": np.int64,
    "keys": np.uint64,
    "origins": np.int64,
}

Keys = npt.NDArray[np.uint64]


def response_key(prompt_ids: Ids, response_ids: Ids) -> bytes:
    """Content address of a response after a prompt: 16 bytes over the exact token ids (law L3)."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt_ids, dtype=np.int32).tobytes())
    digest.update(np.ascontiguousarray(response_ids, dtype=np.int32).tobytes())
    return digest.digest()


@dataclass
class DataCounts:
    """What became of the records read: `read` = `kept` + sum of `dropped`; `changed` were kept but cut."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def drop(self, bad: BadRecord) -> None:
        """Count a record that cannot be used; the first few are kept with their place."""
        self.dropped[bad.reason] += 1
        if len(self.examples) < _SHOWN_EXAMPLES:
            self.examples.append(f"{bad.origin} {bad.reason}")

    def keep(self, pair: EncodedPair) -> None:
        """Count a pair and what encoding did to it."""
        self.kept += 1
        for name in ("prompt_truncated", "response_truncated", "boundary_resplit"):
            self.changed[name] += bool(getattr(pair, name))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, and examples as ``file:line reason``."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            **{name: self.changed[name] for name in sorted(self.changed)},
            "examples": self.examples,
        }


@dataclass(frozen=True)
class PairDataset:
    """Encoded pairs of one list of sources; row = place of a pair in their order.

    Attributes:
        folder: where the arrays lie.
        fingerprint: digest of everything that decided the ids.
        counts: what became of the records (`DataCounts.as_dict`).
        keys: uint64 [responses, 2], `response_key` of each response in row order.
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
        return sum(self.lengths(int(row))[1] for row in rows) / len(rows)

    def response_rows(self, row: int) -> range:
        """Where the keys of a pair's responses stand in `keys`."""
        first, stop = self._pieces(row)
        return range(first - row, stop - row - 1)

    def response_places(self, rows: Rows) -> Rows:
        """Where the keys of all responses of `rows` stand in `keys`, int64."""
        stops = self.pair_pieces[rows] - rows - 1
        counts = stops - np.where(rows > 0, self.pair_pieces[rows - 1], 0) + rows
        starts_in_result = np.cumsum(counts) - counts
        return np.repeat(stops - counts - starts_in_result, counts) + np.arange(counts.sum())

    def row_of_response(self, response: int) -> tuple[int, int]:
        """(row, which) of the response whose key stands at `response`."""
        row = int(np.searchsorted(self.pair_pieces - np.arange(1, len(self) + 1), response, side="right"))
        return row, response - self.response_rows(row).start

    def origin(self, row: int) -> Origin:
        """Where a pair was read."""
        source, line = self.origins[row]
        return Origin(self.source_paths[int(source)], int(line))

    def _pieces(self, row: int) -> tuple[int, int]:
        return (int(self.pair_pieces[row - 1]) if row else 0), int(self.pair_pieces[row])


def prepare_dataset(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
) -> Path:
    """Encode `sources` into a folder below `config.cache`, or find it there; for one process of a run.

    Returns:
        The folder, for `open_dataset`.

    Raises:
        DataError: a source cannot be read, or a record cannot be used and `data.on_bad_record` is `error`.
    """
    fingerprint = _fingerprint(sources, config, tokenizer_digest)
    folder = Path(config.cache) / fingerprint
    if not _is_complete(folder):
        with staged_folder(folder, stands=_is_complete) as temporary:
            writer = _Writer(temporary, sources, fingerprint)
            for number, source in enumerate(sources):
                writer.add_source(number, _encoded(source, config, tokenizer, writer.counts))
            writer.finish()
    return folder


def open_dataset(folder: Path, config: DataConfig) -> PairDataset:
    """Map a folder written by `prepare_dataset`; reads no ids.

    Raises:
        DataError: more was dropped than `data.max_bad_share` allows, or nothing is left.
    """
    manifest = json.loads((folder / _MANIFEST).read_text())
    counts = manifest["counts"]
    _check_counts(counts, config)
    arrays = {name: _map(folder, name, manifest["sizes"][name]) for name in _DTYPES}
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
        origins=arrays["origins"].reshape(-1, 2),
    )


def _map(folder: Path, name: str, size: int) -> npt.NDArray[Any]:
    return np.memmap(folder / f"{name}.bin", dtype=_DTYPES[name], mode="r", shape=(size,))


def _check_counts(counts: dict[str, Any], config: DataConfig) -> None:
    dropped = sum(counts["dropped"].values())
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts["dropped"].items()))
    examples = "; ".join(counts["examples"][:5])
    if counts["kept"] == 0:
        raise DataError(
            "no usable preference pair was read",
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


def _encoded(
    source: SourceConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase, counts: DataCounts
) -> Iterator[tuple[EncodedPair, Origin]]:
    for record in read_records(source):
        counts.read += 1
        pair = record if isinstance(record, BadRecord) else encode_pair(record, tokenizer, config)
        if isinstance(pair, BadRecord):
            if config.on_bad_record is OnBadRecord.error:
                raise DataError(
                    f"a record cannot be used: {pair.reason}",
                    where=str(pair.origin),
                    got=pair.detail,
                    remedy="mend the record, or set data.on_bad_record=drop",
                )
            counts.drop(pair)
            continue
        counts.keep(pair)
        yield pair, record.origin


def _fingerprint(sources: Sequence[SourceConfig], config: DataConfig, tokenizer_digest: str) -> str:
    content = {
        "layout": _LAYOUT_VERSION,
        "tokenizer": tokenizer_digest,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "truncation": config.truncation,
        "text_as_messages": config.text_as_messages,
        "on_bad_record": config.on_bad_record,
        "sources": [
            {
                "path": source.path,
                "content": source_identity(source.path),
                "format": source.format,
                "split": source.split,
                "limit": source.limit,
            }
            for source in sources
        ],
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_complete(folder: Path) -> bool:
    """Whether every array has the size that the manifest promises."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return all(
            (folder / f"{name}.bin").stat().st_size == manifest["sizes"][name] * np.dtype(dtype).itemsize
            for name, dtype in _DTYPES.items()
        )
    except (OSError, ValueError, KeyError):
        return False


class _Writer:
    """Appends pairs to the arrays of a folder; memory does not grow with their number."""

    def __init__(self, folder: Path, sources: Sequence[SourceConfig], fingerprint: str):
        self.folder = folder
        self.sources = sources
        self.fingerprint = fingerprint
        self.counts = DataCounts()
        self.source_pairs: list[int] = []
        self.sizes = dict.fromkeys(_DTYPES, 0)
        self.files = {name: (folder / f"{name}.bin").open("wb") for name in _DTYPES}
        self.total_pieces = 0

    def add_source(self, number: int, pairs: Iterable[tuple[EncodedPair, Origin]]) -> None:
        kept = 0
        for pair, origin in pairs:
            self._add(pair, number, origin.line)
            kept += 1
        self.source_pairs.append(kept)

    def _add(self, pair: EncodedPair, source: int, line: int) -> None:
        for piece in (pair.prompt_ids, *pair.responses):
            self._append("ids", piece)
            self._append("piece_ends", [self.sizes["ids"]])
            self.total_pieces += 1
        for response in pair.responses:
            self._append("keys", np.frombuffer(response_key(pair.prompt_ids, response), dtype=np.uint64))
        self._append("pair_pieces", [self.total_pieces])
        self._append("origins", [source, line])

    def _append(self, name: str, values: npt.ArrayLike) -> None:
        array = np.asarray(values, dtype=_DTYPES[name])
        self.files[name].write(array.tobytes())
        self.sizes[name] += array.size

    def finish(self) -> None:
        for file in self.files.values():
            file.close()
        manifest = {
            "fingerprint": self.fingerprint,
            "sizes": self.sizes,
            "source_paths": [source.path for source in self.sources],
            "source_pairs": self.source_pairs,
            "counts": self.counts.as_dict(),
        }
        write_text(self.folder / _MANIFEST, json.dumps(manifest, indent=1))
