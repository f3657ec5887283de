"""An encoded source on disk: flat arrays and a manifest, written once and memory-mapped."""

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.data.counts import SHOWN_EXAMPLES, DataCounts, Outcome
from dpo_dist.data.encode import EncodedChunk
from dpo_dist.data.folders import root_of
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import (
    is_temporary,
    read_small,
    remember_digest,
    remembered_digest,
    text_digest,
    write_text,
)

Array = npt.NDArray[Any]


class ConcatenatedArray:
    """Read-only concatenation of arrays; `shifts` are added to the values of each when they are read.

    Indexed by a number, by a slice of step 1, or by int64 [n]. A slice within one array copies nothing if
    its shift is 0.
    """

    def __init__(self, parts: Sequence[Array], shifts: Sequence[Any] | None = None):
        self._parts = list(parts)
        self._shifts = list(shifts) if shifts is not None else [0] * len(self._parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "a slice of a concatenated array has step 1"
            part = self._part_of(start)
            if stop <= self._ends[part]:
                first = self._start(part)
                return self._shifted(part, slice(start - first, max(start, stop) - first))
            return self._gather(np.arange(start, stop))
        if np.ndim(index) == 0:
            position = int(index) + (len(self) if index < 0 else 0)
            part = self._part_of(position)
            return self._shifted(part, position - self._start(part))
        return self._gather(np.asarray(index))

    def _gather(self, indices: npt.NDArray[np.int64]) -> Array:
        indices = np.where(indices < 0, indices + len(self), indices)
        parts = np.searchsorted(self._ends, indices, side="right")
        first = self._parts[0]
        gathered = np.empty((len(indices), *first.shape[1:]), dtype=first.dtype)
        for part in np.unique(parts):
            here = parts == part
            gathered[here] = self._shifted(part, indices[here] - self._start(part))
        return gathered

    def _shifted(self, part: int, index: Any) -> Any:
        values, shift = self._parts[part][index], self._shifts[part]
        return values + shift if np.any(shift) else values

    def _part_of(self, position: int) -> int:
        return min(int(np.searchsorted(self._ends, position, side="right")), len(self._parts) - 1)

    def _start(self, part: int) -> int:
        return int(self._ends[part - 1]) if part else 0


Column = Array | ConcatenatedArray


def concatenate(parts: Sequence[Array], shifts: Sequence[Any] | None = None) -> Column:
    """Return a view of all `parts`; a single part is returned itself."""
    return parts[0] if len(parts) == 1 else ConcatenatedArray(parts, shifts)


def check_offsets(
    arrays: Mapping[str, Array], outcome_pairs: Sequence[int], files: int, folder: Path
) -> None:
    """Check the offsets of an encoded source; the token ids are not read.

    Args:
        arrays: as in the files of `encoded_source`.
        outcome_pairs: examples of a record with each distinct outcome.
        files: number of files of the records.
        folder: of the arrays, for the error.

    Raises:
        DataError: an offset or a number is outside of what it counts.
    """
    starts, tokens = arrays["piece_starts"], arrays["piece_tokens"]
    ends, codes = arrays["pair_pieces"], arrays["outcomes"]
    faults = {
        "piece_starts": len(starts) != len(tokens) or not _inside(starts, tokens, len(arrays["ids"])),
        "pair_pieces": len(ends) > 0
        and (
            int(ends.min()) < 0 or int(ends[-1]) > len(starts) or bool((np.diff(ends, prepend=0) < 2).any())
        ),
        "outcomes": len(codes) > 0 and not 0 <= int(codes.min()) <= int(codes.max()) < len(outcome_pairs),
    }
    if not any(faults.values()):
        pairs = np.bincount(codes, minlength=len(outcome_pairs)) @ np.asarray(outcome_pairs, dtype=np.int64)
        faults["outcomes"] = int(pairs) != len(ends)
        faults |= _faults_of_examples(arrays, files)
    if wrong := [name for name, is_wrong in faults.items() if is_wrong]:
        raise DataError(
            "encoded data are damaged in a way that their digests do not show",
            where=str(folder),
            got=f"offsets outside the arrays: {', '.join(wrong)}",
            remedy="delete this folder of data.cache: the data are encoded again",
        )


def check_ids(pieces: Sequence[Array], largest: int, origin: Callable[[], str]) -> None:
    """Check the token ids of one example: an id outside of the vocabulary would abort a GPU's process.

    Args:
        pieces: int32 [tokens] each.
        largest: upper bound of ids.
        origin: returns the file and line of the example, for the error.

    Raises:
        DataError: an id is negative or above `largest`.
    """
    # As unsigned numbers, negative ids are large ones.
    if np.concatenate(pieces).view(np.uint32).max(initial=0) > largest:
        raise DataError(
            "encoded data are damaged in a way that their digests do not show",
            where=origin(),
            got="token ids above the largest one of the manifest",
            remedy="delete this folder of data.cache: the data are encoded again",
        )


def _faults_of_examples(arrays: Mapping[str, Array], files: int) -> dict[str, bool]:
    """Return whether each array has another length than the examples, or values outside of their range."""
    ends, tokens = arrays["pair_pieces"], arrays["piece_tokens"]
    pairs = len(ends)
    responses = (int(ends[-1]) if pairs else 0) - pairs
    lengths = {"keys": 2 * responses, "origins": 2 * pairs, "prompts": pairs}
    lengths |= dict.fromkeys(("scores", "mask_starts", "trained_tokens", "truncated"), responses)
    faults = {name: len(arrays[name]) != length for name, length in lengths.items()}
    if any(faults.values()) or not pairs:
        return faults
    of_files, counted, starts = arrays["origins"][::2], arrays["trained_tokens"], arrays["mask_starts"]
    faults["origins"] = not 0 <= int(of_files.min()) <= int(of_files.max()) < files
    is_response = np.ones(len(tokens), dtype=np.bool_)
    is_response[ends[:-1]], is_response[0], is_response[ends[-1] :] = False, False, False
    of_responses = tokens[is_response]
    faults["trained_tokens"] = counted.min() < 0 or bool((counted > of_responses).any())
    has_mask = counted < of_responses
    faults["mask_starts"] = not _inside(starts[has_mask], of_responses[has_mask], len(arrays["trained"]))
    return faults


def _inside(starts: Array, tokens: Array, size: int) -> bool:
    if not len(starts):
        return True
    if starts.min() < 0 or starts.max() > size or tokens.min() < 0:  # else the sum could overflow
        return False
    return bool((starts + tokens).max() <= size)


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


MEMO_FOLDER = "file_digests"
_FIRST = "-first-"


@dataclass(frozen=True)
class EncodedSource:
    """The first `limit` records (None: all) of a source, encoded in `folder`; configured path, label."""

    path: str
    folder: Path
    limit: int | None = None
    label: str = ""


class SourceWriter:
    """Append encoded chunks to the arrays of a folder, in constant memory."""

    def __init__(self, folder: Path, path: str):
        self.records = 0
        self._largest_id = -1
        self._folder = folder
        self._path = path
        self._sizes = dict.fromkeys(ARRAYS, 0)
        self._streams = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in ARRAYS}
        self._pieces = 0
        self._outcomes: dict[Outcome, int] = {}
        self._files: dict[str, int] = {}
        self._examples: list[tuple[int, int, int, str, str]] = []

    def add(self, chunk: EncodedChunk) -> None:
        """Append the examples of the next records."""
        self._append("piece_starts", self._sizes["ids"] + chunk.piece_starts)
        self._append("piece_tokens", chunk.piece_tokens)
        self._append("ids", chunk.ids)
        self._largest_id = max(self._largest_id, int(chunk.ids.max(initial=-1)))
        self._append("keys", chunk.keys)
        self._append("scores", chunk.scores)
        self._append("mask_starts", self._sizes["trained"] + chunk.mask_starts)
        self._append("trained", chunk.trained)
        self._append("trained_tokens", chunk.trained_tokens)
        self._append("truncated", chunk.truncated)
        self._append("prompts", chunk.prompts)
        self._append("pair_pieces", self._pieces + np.cumsum(chunk.pair_pieces))
        self._append("origins", [(self._file(at.source), at.line) for at in chunk.origins])
        codes = [self._outcomes.setdefault(outcome, len(self._outcomes)) for outcome in chunk.outcomes]
        self._append("outcomes", codes)
        for index, bad in chunk.bad:
            if len(self._examples) < SHOWN_EXAMPLES or all(
                bad.reason != shown[3] for shown in self._examples
            ):
                origin = self._file(bad.origin.source), bad.origin.line
                self._examples.append((self.records + index, *origin, bad.reason, bad.detail))
        self._pieces += len(chunk.piece_starts)
        self.records += len(chunk.outcomes)

    def _file(self, source: str) -> int:
        return self._files.setdefault(source, len(self._files))

    def _append(self, name: str, values: Any) -> None:
        array: Array = np.asarray(values, dtype=ARRAYS[name])
        content = array.tobytes()
        with self._writing():
            self._streams[name].write(content)
        self._hashes[name].update(content)
        self._sizes[name] += array.size

    def finish(self, fingerprint: str, whole: bool) -> None:
        """Write the manifest, which completes the folder."""
        self.close()
        manifest = Manifest(
            fingerprint=fingerprint,
            whole=whole,
            records=self.records,
            largest_id=self._largest_id,
            sizes=self._sizes,
            digests={name: digest.hexdigest() for name, digest in self._hashes.items()},
            outcomes=[(one.dropped, one.pairs, list(one.changed), one.read_as) for one in self._outcomes],
            files=[_relative_name(self._path, source) for source in self._files],
            examples=self._examples,
        )
        content = json.dumps(asdict(manifest), indent=1)
        write_text(self._folder / MANIFEST, json.dumps({"digest": text_digest(content), "content": content}))

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            with self._writing():
                stream.close()

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


def find_encoded(cache: Path, fingerprint: str, limit: int | None) -> Path | None:
    """Return an undamaged folder with the first `limit` records (None: all) of this content, or None."""
    folders = sorted(cache.glob(f"{fingerprint}*"), key=lambda folder: (len(folder.name), folder.name))
    for folder in folders:
        if is_temporary(folder):
            continue
        manifest = read_manifest(folder)
        if manifest is None or manifest.fingerprint != fingerprint:  # damaged, or a renamed folder
            continue
        if manifest.covers(limit) and not find_damage(folder, manifest):
            return folder
    return None


def folder_name(fingerprint: str, limit: int | None) -> str:
    """Return the name of a folder with the first `limit` records (None: all) of this content."""
    return fingerprint if limit is None else f"{fingerprint}{_FIRST}{limit}"


def find_damage(folder: Path, manifest: Manifest) -> list[str]:
    """Return the arrays whose files differ from the manifest; only files that have changed are read."""
    return [name for name in ARRAYS if not _is_whole(folder, name, manifest)]


def _is_whole(folder: Path, name: str, manifest: Manifest) -> bool:
    file = folder / f"{name}.bin"
    try:
        if file.stat().st_size != manifest.sizes[name] * np.dtype(ARRAYS[name]).itemsize:
            return False
        return remembered_digest(file, folder.parent / MEMO_FOLDER) == manifest.digests[name]
    except (OSError, ConfigError, KeyError):  # an older version has fewer arrays
        return False


def remember_written(folder: Path) -> None:
    """Remember the digests of a folder just written by this process."""
    manifest = read_manifest(folder)
    if manifest is not None:
        for name in ARRAYS:
            remember_digest(folder / f"{name}.bin", folder.parent / MEMO_FOLDER, manifest.digests[name])


def array_files(folder: Path) -> list[Path]:
    """Return the files of the arrays of an encoded source."""
    return [folder / f"{name}.bin" for name in ARRAYS]


def is_intact(file: Path) -> bool:
    """Return whether the file of an array has the content that the manifest beside it states."""
    manifest = read_manifest(file.parent)
    return manifest is not None and _is_whole(file.parent, file.stem, manifest)


@dataclass(frozen=True)
class SourceView:
    """The used records of a source, memory-mapped.

    Attributes:
        counts: of these records.
        pairs: number of examples made from them.
        files: their files, named as the source was configured.
        arrays: by the names of `PreferenceDataset`'s attributes.
    """

    counts: DataCounts
    pairs: int
    files: list[str]
    arrays: dict[str, Array]


def view(source: EncodedSource, manifest: Manifest) -> SourceView:
    """Map the first `limit` records of an encoded source without reading their ids."""
    arrays = {name: _map(source.folder, name, manifest.sizes[name]) for name in ARRAYS}
    used = arrays["outcomes"][: source.limit]
    check_offsets(arrays, [pairs for _, pairs, *_ in manifest.outcomes], len(manifest.files), source.folder)
    outcomes = [
        Outcome(drop, pairs, tuple((n, k) for n, k in changed), *read_as)
        for drop, pairs, changed, *read_as in manifest.outcomes
    ]
    numbers = np.bincount(used, minlength=len(outcomes)).tolist()
    files = [_display_name(source.path, name) for name in manifest.files]
    shown = [example for example in manifest.examples if example[0] < len(used)]
    examples = [f"{files[file]}:{line} {reason}" for _, file, line, reason, _ in shown]
    details = {reason: detail for *_, reason, detail in reversed(shown) if detail}
    counts = DataCounts.of(Counter(dict(zip(outcomes, numbers, strict=True))), examples, details)
    pieces = int(arrays["pair_pieces"][pairs - 1]) if (pairs := counts.pairs) else 0
    responses = pieces - pairs
    return SourceView(
        counts,
        pairs,
        files,
        {
            "ids": arrays["ids"],
            "piece_starts": arrays["piece_starts"][:pieces],
            "piece_tokens": arrays["piece_tokens"][:pieces],
            "pair_pieces": arrays["pair_pieces"][:pairs],
            "keys": arrays["keys"].reshape(-1, 2)[:responses],
            "scores": arrays["scores"][:responses],
            "trained": arrays["trained"],
            "mask_starts": arrays["mask_starts"][:responses],
            "trained_tokens": arrays["trained_tokens"][:responses],
            "truncated": arrays["truncated"][:responses],
            "prompts": arrays["prompts"][:pairs],
            "origins": arrays["origins"].reshape(-1, 2)[:pairs],
        },
    )


def _map(folder: Path, name: str, size: int) -> npt.NDArray[Any]:
    if not size:
        return np.empty(0, dtype=ARRAYS[name])
    return np.memmap(folder / f"{name}.bin", dtype=ARRAYS[name], mode="r", shape=(size,))


def _relative_name(path: str, source: str) -> str:
    return os.path.relpath(Path(source).expanduser(), root_of(path).expanduser())


def _display_name(path: str, name: str) -> str:
    return path if name == "." else str(root_of(path) / name)


# Arrays of which training depends; masks only if there are some.
_EXAMPLES = ("ids", "piece_starts", "piece_tokens", "pair_pieces", "keys", "scores")
_MASKS = ("trained", "mask_starts")
# Of several sources that were encoded by several versions.
_MOST_COMBINATIONS = 1 << 12


def data_fingerprint(parts: Iterable[tuple[str, int | None]]) -> str:
    """Return the fingerprint of data, given that of each source and its limit."""
    return text_digest(json.dumps(list(parts)))


def was_fingerprint_of(recorded: str, sources: Sequence[EncodedSource]) -> bool:
    """Return whether an earlier version gave `recorded` to the examples of these sources.

    The folders beside those of the sources are compared: false if the former ones were deleted.
    """
    formers = [list(_formers(source)) for source in sources]
    combinations = itertools.islice(itertools.product(*formers), _MOST_COMBINATIONS)
    return any(data_fingerprint(parts) == recorded for parts in combinations)


def _formers(source: EncodedSource) -> Iterator[tuple[str, int | None]]:
    own = read_manifest(source.folder)
    for folder in sorted(source.folder.parent.iterdir()):
        former = None if is_temporary(folder) else read_manifest(folder)
        if own is not None and former is not None and _has_same_examples(own, former):
            yield former.fingerprint, source.limit


def _has_same_examples(one: Manifest, other: Manifest) -> bool:
    has_masks = [bool(manifest.sizes.get("trained")) for manifest in (one, other)]
    compared = _EXAMPLES + _MASKS if any(has_masks) else _EXAMPLES
    return all(one.digests.get(name) == other.digests.get(name) for name in compared)
