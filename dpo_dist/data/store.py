"""Encoded sources on disk: one file of numbers for each column and a manifest, written once and mapped."""

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.data.counts import SHOWN_EXAMPLES, DataCounts, Outcome
from dpo_dist.data.records import BadRecord
from dpo_dist.data.sources import root_of
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import (
    is_temporary,
    remember_digest,
    remembered_digest,
    staged_folder,
    text_digest,
    write_text,
)

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Column:
    """One column of encoded data.

    Attributes:
        of: what has one row each: `tokens`, `pieces`, `examples`, `responses`, `masked tokens`, `records`.
        kind: type of its numbers.
        width: numbers in a row.
        offset_in: the column in which its numbers are positions; "" if they are none.
    """

    of: str
    kind: type[np.generic]
    width: int = 1
    offset_in: str = ""

    def array(self, values: Sequence[Any]) -> Array:
        """Return values, or arrays of values, of consecutive rows as one array."""
        if values and isinstance(values[0], np.ndarray) and self.width == 1:
            return np.concatenate(values).astype(self.kind, copy=False)
        return self.shaped(np.array(values, dtype=self.kind))

    def shaped(self, numbers: Array) -> Array:
        """Return numbers as rows."""
        return numbers if self.width == 1 else numbers.reshape(-1, self.width)


COLUMNS = {
    "ids": Column("tokens", np.int32),
    "piece_starts": Column("pieces", np.int64, offset_in="ids"),
    "piece_tokens": Column("pieces", np.int32),
    "pair_pieces": Column("examples", np.int64, offset_in="piece_starts"),
    "keys": Column("responses", np.uint64, width=2),
    "scores": Column("responses", np.float64),
    "trained": Column("masked tokens", np.bool_),
    "mask_starts": Column("responses", np.int64, offset_in="trained"),
    "trained_tokens": Column("responses", np.int32),
    "truncated": Column("responses", np.bool_),
    "prompts": Column("examples", np.uint64),
    "origins": Column("examples", np.int64, width=2),
    "outcomes": Column("records", np.int32),
}
"""The columns of encoded data; `PreferenceDataset` says what they mean."""


@dataclass(frozen=True, eq=False)
class EncodedChunk:
    """Examples of consecutive records of one source.

    Attributes:
        arrays: the columns but `outcomes`; positions count from the start of the chunk.
        files: of the records; `origins` has indices in it.
        outcomes: [records].
        bad: the first dropped records and the first for each reason, each with its index in the chunk.
    """

    arrays: dict[str, Array]
    files: list[str]
    outcomes: list[Outcome]
    bad: list[tuple[int, BadRecord]]


MANIFEST = "manifest.json"
MEMO_FOLDER = "file_digests"
_FIRST = "-first-"


@dataclass(frozen=True)
class Manifest:
    """Description of an encoded source, stored beside its columns.

    Attributes:
        fingerprint: digest of everything that decides the ids.
        whole: whether the source was read to its end.
        records: number of records read.
        largest_id: of all token ids; -1 if there are none.
        rows, digests: of each column.
        outcomes: the distinct outcomes of records, each as ``[dropped, pairs, changed, read_as]``; values of
            the column `outcomes` are indices in this list.
        files: the files of examples and bad records, relative to the source's path.
        examples: the first dropped records and the first for each reason, each as
            ``[record index, file index, line, reason, detail]``.
    """

    fingerprint: str
    whole: bool
    records: int
    largest_id: int
    rows: dict[str, int]
    digests: dict[str, str]
    outcomes: list[tuple[Any, ...]]
    files: list[str]
    examples: list[tuple[int, int, int, str, str]]


def _read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if it is missing or damaged."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class EncodedSource:
    """The first `limit` records (None: all) of a source, encoded in `folder`; configured path, label."""

    path: str
    folder: Path
    limit: int | None = None
    label: str = ""


class SourceWriter:
    """Append encoded chunks to the columns of a folder, in constant memory."""

    def __init__(self, folder: Path, final: Path, path: str):
        """Args: the folder to fill, its name when it is complete, and the configured path of the source."""
        self.final = final
        self.records = 0
        self._largest_id = -1
        self._folder = folder
        self._path = path
        self._rows = dict.fromkeys(COLUMNS, 0)
        self._streams = {name: _file(folder, name).open("wb") for name in COLUMNS}
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in COLUMNS}
        self._outcomes: dict[Outcome, int] = {}
        self._files: dict[str, int] = {}
        self._examples: list[tuple[int, int, int, str, str]] = []

    def add(self, chunk: EncodedChunk) -> None:
        """Append the examples of the next records."""
        arrays = dict(chunk.arrays)
        for name, column in COLUMNS.items():
            if column.offset_in:
                arrays[name] = arrays[name] + self._rows[column.offset_in]
        if len(arrays["origins"]):
            numbers = np.array([self._file_number(file) for file in chunk.files])
            arrays["origins"] = np.stack([numbers[arrays["origins"][:, 0]], arrays["origins"][:, 1]], axis=1)
        codes = [self._outcomes.setdefault(outcome, len(self._outcomes)) for outcome in chunk.outcomes]
        arrays["outcomes"] = COLUMNS["outcomes"].array(codes)
        for index, bad in chunk.bad:
            is_new = all(bad.reason != shown[3] for shown in self._examples)
            if is_new or len(self._examples) < SHOWN_EXAMPLES:
                origin = self._file_number(bad.origin.source), bad.origin.line
                self._examples.append((self.records + index, *origin, bad.reason, bad.detail))
        self._largest_id = max(self._largest_id, int(arrays["ids"].max(initial=-1)))
        self.records += len(chunk.outcomes)
        for name, array in arrays.items():
            content = array.tobytes()
            with self._writing():
                self._streams[name].write(content)
            self._hashes[name].update(content)
            self._rows[name] += len(array)

    def finish(self, fingerprint: str, whole: bool) -> None:
        """Write the manifest, which completes the folder."""
        self.close()
        manifest = Manifest(
            fingerprint=fingerprint,
            whole=whole,
            records=self.records,
            largest_id=self._largest_id,
            rows=self._rows,
            digests={name: digest.hexdigest() for name, digest in self._hashes.items()},
            outcomes=[(one.dropped, one.pairs, list(one.changed), one.read_as) for one in self._outcomes],
            files=[_relative_name(self._path, source) for source in self._files],
            examples=self._examples,
        )
        write_text(self._folder / MANIFEST, json.dumps(asdict(manifest), indent=1))

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            with self._writing():
                stream.close()

    def _file_number(self, source: str) -> int:
        return self._files.setdefault(source, len(self._files))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the error of a full disk has no file name
            raise ConfigError(
                "the encoded data cannot be written",
                where="data.cache",
                got=f"{self._folder}: {error}",
                remedy="free disk space, or set data.cache to a folder on another disk",
            ) from error


@contextlib.contextmanager
def writing(cache: Path, fingerprint: str, path: str, limit: int | None) -> Iterator[SourceWriter]:
    """Yield the writer of a source; on exit without an error its folder in the cache is complete."""
    final = cache / (fingerprint if limit is None else f"{fingerprint}{_FIRST}{limit}")
    if final.exists():
        log.warning("%s is damaged and is encoded again", final)

    def is_complete(written: Path) -> bool:
        return find_encoded(cache, fingerprint, limit) == written

    with (
        staged_folder(final, is_complete) as temporary,
        contextlib.closing(SourceWriter(temporary, final, path)) as writer,
    ):
        yield writer
        writer.finish(fingerprint, whole=limit is None or writer.records < limit)
    if manifest := _read_manifest(final):
        for name, digest in manifest.digests.items():
            remember_digest(_file(final, name), cache / MEMO_FOLDER, digest)


def find_encoded(cache: Path, fingerprint: str, limit: int | None) -> Path | None:
    """Return an undamaged folder with the first `limit` records (None: all) of this content, or None."""
    folders = sorted(cache.glob(f"{fingerprint}*"), key=lambda folder: (len(folder.name), folder.name))
    for folder in folders:
        manifest = None if is_temporary(folder) else _read_manifest(folder)
        if manifest is None or manifest.fingerprint != fingerprint:  # a renamed folder
            continue
        covers = manifest.whole or (limit is not None and manifest.records >= limit)
        if covers and not _damaged(folder, manifest):
            return folder
    return None


def _damaged(folder: Path, manifest: Manifest) -> list[str]:
    """Return the columns whose files differ from the manifest; only files that have changed are read."""

    def is_whole(name: str) -> bool:
        try:
            found = remembered_digest(_file(folder, name), folder.parent / MEMO_FOLDER)
        except ConfigError:
            return False
        return found == manifest.digests[name]

    return [name for name in COLUMNS if not is_whole(name)]


@dataclass(frozen=True)
class SourceView:
    """The used records of a source, memory-mapped.

    Attributes:
        manifest: of the source.
        counts: of these records.
        files: their files, named as the source was configured.
        arrays: the columns but `outcomes`.
    """

    manifest: Manifest
    counts: DataCounts
    files: list[str]
    arrays: dict[str, Array]


def view(source: EncodedSource) -> SourceView:
    """Map the first `limit` records of an encoded source; only files that have changed are read.

    Raises:
        DataError: a file is damaged.
    """
    manifest = _read_manifest(source.folder)
    damaged = [MANIFEST] if manifest is None else _damaged(source.folder, manifest)
    if manifest is None or damaged:
        raise DataError(
            "the encoded data are damaged",
            where=str(source.folder),
            got=", ".join(damaged),
            remedy="start again: damaged data are encoded again",
        )
    arrays = {name: _map(source.folder, name, rows) for name, rows in manifest.rows.items()}
    used = arrays.pop("outcomes")[: source.limit]
    outcomes = [
        Outcome(drop, pairs, tuple((n, k) for n, k in changed), read_as)
        for drop, pairs, changed, read_as in manifest.outcomes
    ]
    numbers = np.bincount(used, minlength=len(outcomes)).tolist()
    files = [_display_name(source.path, name) for name in manifest.files]
    shown = [example for example in manifest.examples if example[0] < len(used)]
    examples = [f"{files[file]}:{line} {reason}" for _, file, line, reason, _ in shown]
    details = {reason: detail for *_, reason, detail in reversed(shown) if detail}
    counts = DataCounts.of(Counter(dict(zip(outcomes, numbers, strict=True))), examples, details)
    pieces = int(arrays["pair_pieces"][counts.pairs - 1]) if counts.pairs else 0
    rows = {"examples": counts.pairs, "pieces": pieces, "responses": pieces - counts.pairs}
    used_rows = {name: array[: rows.get(COLUMNS[name].of)] for name, array in arrays.items()}
    return SourceView(manifest, counts, files, used_rows)


def _map(folder: Path, name: str, rows: int) -> Array:
    column = COLUMNS[name]
    if not rows:
        return column.array([])
    return column.shaped(np.memmap(_file(folder, name), dtype=column.kind, mode="r"))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _relative_name(path: str, source: str) -> str:
    return os.path.relpath(Path(source).expanduser(), root_of(path).expanduser())


def _display_name(path: str, name: str) -> str:
    return path if name == "." else str(root_of(path) / name)


class Parts:
    """Read-only concatenation of mapped arrays, of which slices are read."""

    def __init__(self, parts: Sequence[Array]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice) -> Array:
        start, stop, _ = index.indices(len(self))
        first = int(np.searchsorted(self._ends, start, side="right"))
        found = []
        for part, end in zip(self._parts[first:], self._ends[first:].tolist(), strict=True):
            before = end - len(part)
            found.append(part[max(start - before, 0) : max(stop - before, 0)])
            if stop <= end:
                break
        return found[0] if len(found) == 1 else np.concatenate([self._parts[0][:0], *found])


def joined(views: Sequence[SourceView], name: str) -> Array | Parts:
    """Return a column of all sources: mapped; but the small columns of several sources are loaded."""
    parts = [mapped.arrays[name] for mapped in views]
    if len(parts) == 1:
        return parts[0]
    column = COLUMNS[name]
    if column.of in ("tokens", "masked tokens"):
        return Parts(parts)
    sizes: list[Any] = [0]
    if column.offset_in:
        sizes = [len(mapped.arrays[column.offset_in]) for mapped in views]
    elif name == "origins":
        sizes = [np.array([len(mapped.files), 0]) for mapped in views]
    if np.any(sizes):
        parts = [part + sum(sizes[:number]) for number, part in enumerate(parts)]
    return np.concatenate(parts)


def data_fingerprint(parts: Iterable[tuple[str, int | None]]) -> str:
    """Return the fingerprint of data, given that of each source and its limit."""
    return text_digest(json.dumps(list(parts)))
