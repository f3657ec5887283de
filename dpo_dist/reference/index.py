"""The index of a fingerprint's entries, which all processes map; the shards that were read and found whole.

    <fingerprint>/<digest>.index    the columns of `Index`, one behind the other, and a digest of them
    <fingerprint>/verified.json     files of this folder that were found whole, and their `file_state` then

An index's name is the digest of the names of its shards: jobs that see the same shards write the same file.
Both files can be deleted at any time. No value depends on them: each is verified when it is read.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.example import Keys
from dpo_dist.foundation.files import staged_file, text_digest, write_text

log = logging.getLogger(__name__)

_INDEX_FORMAT = 1
_SUFFIX = ".index"
_DIGEST_BYTES = 16
_MEMO = "verified.json"

_Column: TypeAlias = npt.NDArray[Any]
Positions: TypeAlias = npt.NDArray[np.intp]


class Index(NamedTuple):
    """Entries sorted by the first words of their keys, those with an equal one in the order of the shards."""

    first_words: _Column  # uint64 [entries], as all columns
    second_words: _Column  # uint64
    starts: _Column  # uint64, place of an entry's first value in the shard's file, in bytes
    tokens: _Column  # uint32, number of values
    checks: _Column  # uint32, CRC-32 of the values
    shards: _Column  # uint32, number of the shard

    def locate(self, keys: Keys) -> tuple[Positions, Positions]:
        """Return where the first entry with each key is, and where its first word ends; equal: no entry.

        Fast for sorted keys, of which neighbours are found on the same pages.
        """
        first, second = keys.T
        found = np.searchsorted(self.first_words, first)
        stops = np.searchsorted(self.first_words, first, side="right")
        waiting = np.flatnonzero(found < stops)
        # Different keys hardly ever have the same first word.
        while len(waiting := waiting[self.second_words[found[waiting]] != second[waiting]]):
            found[waiting] += 1
            waiting = waiting[found[waiting] < stops[waiting]]
        return found, stops


_KINDS = (np.uint64, np.uint64, np.uint64, np.uint32, np.uint32, np.uint32)
_ENDS = np.cumsum([np.dtype(kind).itemsize for kind in _KINDS])


class UnsortedEntries:
    """Entries in the order of their shards; in memory, 32 bytes each."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        # Arrays of each shard would leave gaps when they are freed.
        self._columns = [bytearray() for _ in _KINDS[:-1]]

    def add(self, keys: Keys, starts: _Column, tokens: _Column, checks: _Column) -> None:
        """Add the entries of one shard."""
        self._counts.append(len(keys))
        for column, kind, part in zip(self._columns, _KINDS, (*keys.T, starts, tokens, checks), strict=False):
            column.extend(part.astype(kind).data)

    def sorted_columns(self) -> Iterator[_Column]:
        """Yield the columns of the `Index`, one at a time: each is large."""
        columns = [np.frombuffer(each, kind) for each, kind in zip(self._columns, _KINDS, strict=False)]
        # Stable, so that the earlier shard's entry of a key comes first.
        order = np.argsort(columns[0], kind="stable")
        yield from (column[order] for column in columns)
        yield np.repeat(np.arange(len(self._counts), dtype=np.uint32), self._counts)[order]


def map_index(folder: Path, shards: Sequence[str]) -> Index | None:
    """Map the index of these shards; None if there is none, or it is damaged."""
    file = _index_file(folder, shards)
    try:
        state = file_state(file)
        with file.open("rb") as opened:
            try:  # the map keeps the lock as long as it exists
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # another process removes it
                return None
            except OSError:  # a file system without locks, where nobody removes it
                pass
            content = np.asarray(np.memmap(opened, np.uint8, "r"))
    except (OSError, ValueError):  # an empty file is a ValueError
        return None
    columns, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if recall_whole(folder).get(file.name) != state:
        if _begin_digest(file, columns).digest() != digest.tobytes():
            log.warning("%s is damaged, and is built again", file)
            return None
        remember_whole(folder, {file.name: state})
    parts = np.split(columns, len(columns) // _ENDS[-1] * _ENDS[:-1])
    return Index(*(part.view(kind) for part, kind in zip(parts, _KINDS, strict=True)))


def write_index(folder: Path, shards: Sequence[str], entries: UnsortedEntries) -> Index:
    """Write the index of these shards, remove those of other ones, and map it; else return it in memory."""
    file = _index_file(folder, shards)
    try:
        if shards and os.access(folder, os.W_OK):  # else a warning has been given
            with staged_file(file) as staged, staged.open("wb") as stream:
                digest = _begin_digest(file)
                for column in entries.sorted_columns():
                    digest.update(column.data)
                    stream.write(column.data)
                stream.write(digest.digest())
            _remove_others(file)
            if (index := map_index(folder, shards)) is not None:
                return index
    except OSError as error:
        log.warning("an index of the reference store cannot be written, each process has its own: %s", error)
    return Index(*entries.sorted_columns())


def _index_file(folder: Path, shards: Sequence[str]) -> Path:
    return folder / f"{text_digest(json.dumps([_INDEX_FORMAT, *shards]))}{_SUFFIX}"


def _begin_digest(file: Path, *columns: _Column) -> "hashlib.blake2b":
    """Return the digest of an index's name and of these columns: a renamed index is damaged."""
    digest = hashlib.blake2b(file.name.encode(), digest_size=_DIGEST_BYTES)
    for column in columns:
        digest.update(column.data)
    return digest


def _remove_others(file: Path) -> None:
    """Remove the indexes beside `file` that no process has mapped.

    A network file system may take the pages of a removed file from the processes of other nodes.
    """
    for other in file.parent.glob(f"*{_SUFFIX}"):
        if other != file:
            with suppress(OSError), other.open("r+b") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                other.unlink()


def file_state(file: Path) -> str:
    """Return size, times and number of a file, which change with its content; raises FileNotFoundError.

    The content is not sampled, which takes seconds for thousands of files on a network disk. Damage that
    leaves the times as they were is found when a value is read.
    """
    status = file.stat()
    return f"{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_ino}"


def recall_whole(folder: Path) -> dict[str, str]:
    """Return the names of the files that were found whole, with their `file_state` then."""
    with suppress(OSError, ValueError, AttributeError):
        return dict(json.loads((folder / _MEMO).read_bytes()).items())
    return {}


def remember_whole(folder: Path, states: Mapping[str, str]) -> None:
    """Add files that were found whole; concurrent jobs may lose names, which are verified again."""
    if states:
        _write_memo(folder, {**recall_whole(folder), **states})


def forget_whole(folder: Path, names: Iterable[str]) -> bool:
    """Let the next start verify these files and all indexes; return whether it will."""
    known, damaged = recall_whole(folder), {*names}
    kept = {name: known[name] for name in known if name not in damaged and not name.endswith(_SUFFIX)}
    return kept == known or _write_memo(folder, kept)


def _write_memo(folder: Path, states: Mapping[str, str]) -> bool:
    if not os.access(folder, os.W_OK):
        return False
    try:
        existing = {file.name for file in folder.iterdir()}
        left = {name: state for name, state in sorted(states.items()) if name in existing}
        write_text(folder / _MEMO, json.dumps(left, indent=0))
    except OSError as error:
        log.warning("the reference store cannot remember its verified shards: %s", error)
        return False
    return True
