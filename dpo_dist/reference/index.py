"""The index of a fingerprint's entries, which all processes map, and the memo of its verified shards.

    <fingerprint>/<digest>.index    the columns of `Index`; the digest is that of the names of its shards
    <fingerprint>/verified.json     the names of shards without damage, and their `file_state` then

No value depends on them: each is verified when it is read.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.content_keys import Keys
from dpo_dist.foundation.files import remove_abandoned, temporary_folder, text_digest, write_text

if TYPE_CHECKING:
    from dpo_dist.foundation.tables import Columns

log = logging.getLogger(__name__)

_INDEX_FORMAT = 2
_MEMO = "verified.json"
# A network file system may take the pages of a removed file from the processes of other nodes.
_UNUSED_SECONDS = 30 * 24 * 3600

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
        rows = np.searchsorted(self.first_words, first)
        stops = np.searchsorted(self.first_words, first, side="right")
        waiting = np.flatnonzero(rows < stops)
        # Different keys hardly ever have the same first word.
        while True:
            waiting = waiting[self.second_words[rows[waiting]] != second[waiting]]
            if not len(waiting):
                break
            rows[waiting] += 1
            waiting = waiting[rows[waiting] < stops[waiting]]
        return rows, stops


_KINDS = (np.uint64, np.uint64, np.uint64, np.uint32, np.uint32, np.uint32)


def open_index(folder: Path, shards: Sequence[str], read: Callable[[], Iterator[Sequence[_Column]]]) -> Index:
    """Map the index of these shards; write it if there is none, with the columns that `read` yields for each.

    In a folder that cannot be written, each process has its own.
    """
    from dpo_dist.foundation.tables import Columns, stored_columns  # noqa: PLC0415  (slow to import)

    if not shards:
        return Index(*(np.empty(0, kind) for kind in _KINDS))
    content = {"format": _INDEX_FORMAT, "shards": [*shards]}
    file = folder / f"{text_digest(json.dumps(content))}.index"

    def build(columns: "Columns") -> dict[str, Any]:
        for old in file.parent.glob("*.index"):
            with suppress(OSError):
                if time.time() - old.stat().st_atime > _UNUSED_SECONDS:
                    old.unlink()
        with temporary_folder(file) as scratch:
            unsorted = Columns(scratch)
            for part in read():
                for name, kind, column in zip(Index._fields, _KINDS, part, strict=True):
                    unsorted.append(**{name: column.astype(kind)})
            # Stable, so that the earlier shard's entry of a key comes first.
            order = np.argsort(unsorted["first_words"], kind="stable")
            for name in Index._fields:
                columns.append(**{name: unsorted[name][order]})
        return {}

    try:
        remove_abandoned(folder)  # a killed process leaves columns
        columns, _ = stored_columns(file, content, build)
    except OSError as error:
        log.warning("each process has its own index of the reference store: %s", error)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / file.name
            columns, _ = stored_columns(file, content, build)
    return Index(**columns)


def file_state(file: Path) -> str | None:
    """Return size, times and number of a file, which change with its content; None if it is missing.

    The content is not sampled, which takes seconds for thousands of files on a network disk. Damage that
    leaves the times as they were is found when a value is read.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return f"{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_ino}"


def recall_whole(folder: Path) -> dict[str, str]:
    """Return the names of the shards that were found whole, with their `file_state` then."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / _MEMO).read_bytes()))
    return {}


def remember_whole(folder: Path, states: Mapping[str, str | None]) -> None:
    """Add shards that were found whole; concurrent jobs may lose names, which are verified again."""
    with suppress(OSError):
        write_text(folder / _MEMO, json.dumps({**recall_whole(folder), **states}, indent=0))


def forget_whole(folder: Path) -> bool:
    """Let the next start verify all shards and indexes; return False if it will not."""
    try:
        for index in folder.glob("*.index"):
            index.touch()
        (folder / _MEMO).unlink(missing_ok=True)
    except OSError:
        return False
    return True
