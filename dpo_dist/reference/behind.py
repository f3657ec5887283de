"""Published stores behind the local one, of which entries are fetched rather than computed.

A stranger's store is data that is checked: its list is JSON, its entries are rows of numbers, and the headers
of its shards are never read. An entry that cannot be that of the run's response counts as missing.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.content_keys import Keys
from dpo_dist.foundation.errors import DataError, ReferenceModelError
from dpo_dist.foundation.remote import is_web, remote_errors
from dpo_dist.foundation.text import size
from dpo_dist.reference.index import Index
from dpo_dist.reference.published import ENTRY, LIST, PUBLISHED_FORMAT, open_place, values_digest
from dpo_dist.reference.store import ReferenceFingerprint, StoredLogps, fingerprint_in

log = logging.getLogger(__name__)

_LARGEST_LIST = 2**24
_LARGEST_ENTRIES = 2**32
_LARGEST_PLACE = 2**48
_LARGEST_STREAM = 2**30
_GAP = 2**16  # between two entries; up to it they are one request
_REQUEST = 2**23
_FEW = 0.1  # of what was asked, below which the run says what may be the cause
_PART = 2**26  # that a thread has in memory
_THREADS = 8
_ROUNDING = 1e-3  # of the log-prob 0
_NAME = re.compile(r"[0-9a-f]{32}")
_SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")


@dataclass(frozen=True)
class Fetched:
    """What came from a store: entries of those asked for, bytes, and how many entries were left out.

    `differences`: in words, where the store has few of them, what is other there than in this run.
    """

    url: str
    asked: int
    entries: int
    bytes: int
    left_out: int
    differences: tuple[str, ...] = ()


def merge_fetched(several: Iterable[Fetched]) -> tuple[Fetched, ...]:
    """Return one count for each URL."""
    by_url = dict[str, Fetched]()
    for each in several:
        before = by_url.get(each.url, Fetched(each.url, 0, 0, 0, 0))
        by_url[each.url] = Fetched(
            each.url,
            before.asked + each.asked,
            before.entries + each.entries,
            before.bytes + each.bytes,
            before.left_out + each.left_out,
            each.differences or before.differences,
        )
    return tuple(by_url.values())


def fault_of_logps(values: StoredLogps) -> str:
    """Return, in words, why values cannot be log-probs; "" if they can."""
    is_logp = np.isfinite(values) & (values <= _ROUNDING)
    return "" if is_logp.all() else f"the log-prob {values[~is_logp][0]:g}"


class Space(NamedTuple):
    """What a list says of a fingerprint: its `space.json`, shards, entries by digest and bytes, numbers.

    `recipe`: what decided the token ids of the run that scored last.
    """

    space: dict[str, Any]
    shards: list[str]
    entries: str
    bytes: int
    numbers: int
    recipe: dict[str, Any]
    license: str

    @property
    def entry_count(self) -> int:
        """The number of entries."""
        return self.bytes // ENTRY.itemsize


@dataclass
class _Read:
    """A part of a shard's file, with these of the wanted entries."""

    shard: int
    first: int
    stop: int
    rows: list[int]


class _NoRangesError(OSError):
    """A server that is asked for a part of a file sends the whole."""


@dataclass
class Behind:
    """A published store; `received` counts bytes, the others are as in `Fetched`.

    Making one sends no request. Raises ConfigError: the URL cannot be used, or its package is missing.
    """

    url: str
    received: int = 0
    left_out: int = 0
    differences: tuple[str, ...] = ()
    _system: Any = field(init=False, repr=False)
    _path: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._system, self._path = open_place(self.url)

    def spaces(self) -> dict[str, Space]:
        """Return what the list says, by names of fingerprints. Raises DataError, ReferenceModelError."""
        content = self._whole(LIST, _LARGEST_LIST)
        with self._plain_errors():
            listed = json.loads(content)
            if listed["format"] != PUBLISHED_FORMAT:
                raise ValueError(f"format {listed['format']!r} in place of {PUBLISHED_FORMAT}")
            return {name: _checked(name, Space(**one)) for name, one in listed["fingerprints"].items()}

    def find(
        self,
        fingerprint: ReferenceFingerprint,
        keys: Keys,
        tokens: npt.NDArray[np.int64],
        fault: Callable[[StoredLogps], str],
        recipe: Mapping[str, Any],
    ) -> Iterator[tuple[int, StoredLogps]]:
        """Yield the places in `keys` of those that the store has, and their values, of `tokens` tokens each.

        Left out are values of which `fault` returns words, and those that cannot be downloaded. `recipe`:
        what decides the token ids of this run. Raises DataError, ReferenceModelError: the list or the entries
        cannot be read.
        """
        spaces = self.spaces()
        space = spaces.get(fingerprint.name)
        if space is None:
            of_model = [
                each.space for each in spaces.values() if each.space["reference"] == fingerprint.reference
            ]
            others = [_differences(other["profile"], fingerprint.profile) for other in of_model]
            self.differences = min(others, key=len, default=())
            return
        index, digests = self._entries(fingerprint.name, space)
        places, stops = index.locate(keys)
        found = np.flatnonzero(places < stops)
        if len(found) < len(keys) * _FEW:
            self.differences = _differences(space.recipe, recipe)
        places = places[found]
        # The lengths are known: what is longer is not read.
        fits = index.tokens[places] == fingerprint.width * tokens[found]
        fits &= (index.shards[places] < len(space.shards)) & (index.starts[places] < _LARGEST_PLACE)
        self.left_out += int((~fits).sum())
        found = found[fits]
        places = places[fits]
        has_ranges = self._has_ranges(f"{fingerprint.name}/{space.entries}.entries", space.bytes)
        parts = _divide(index, places, _PART if has_ranges else _LARGEST_PLACE)
        if not has_ranges:
            self._check_stream(parts)

        def fetch(part: Sequence[_Read]) -> dict[int, StoredLogps]:
            """Return the entries of a part that are right, which are not all where a download ends early."""
            entries = dict[int, StoredLogps]()
            name = f"{fingerprint.name}/{space.shards[part[0].shard]}"
            contents = self._ranges(name, part) if has_ranges else self._stream(name, part)
            with self._logged_errors(name):
                for read, content in zip(part, contents, strict=True):
                    for row in read.rows:
                        start = int(index.starts[places[row]]) - read.first
                        values = content[start : start + 4 * int(index.tokens[places[row]])]
                        if values_digest(values) != digests[places[row]].tobytes():
                            continue
                        entry = np.frombuffer(values, "<f4")
                        entry = entry if fingerprint.width == 1 else entry.reshape(-1, fingerprint.width)
                        if not fault(entry):
                            entries[int(found[row])] = entry
            return entries

        with ThreadPoolExecutor(_THREADS) as pool:
            for begin in range(0, len(parts), _THREADS):  # in memory are the values of so many parts
                some = parts[begin : begin + _THREADS]
                for part, entries in zip(some, pool.map(fetch, some), strict=True):
                    read = sum(each.stop - each.first for each in part)
                    self.received += read if has_ranges else part[-1].stop
                    self.left_out += sum(len(each.rows) for each in part) - len(entries)
                    yield from entries.items()

    def _entries(self, name: str, space: Space) -> tuple[Index, npt.NDArray[np.uint8]]:
        """Return the entries of a fingerprint as an index, and the digests of their values."""
        content = self._whole(f"{name}/{space.entries}.entries", space.bytes)
        with self._plain_errors():
            if values_digest(content).hex() != space.entries:
                raise ValueError("entries with another digest")
            table = np.frombuffer(content, ENTRY)
            first_words = np.ascontiguousarray(table["key"][:, 0])
            if (first_words[1:] < first_words[:-1]).any():
                raise ValueError("entries that are not sorted")
        second_words = np.ascontiguousarray(table["key"][:, 1])
        columns = (np.ascontiguousarray(table[each]) for each in ("start", "numbers", "shard"))
        starts, numbers, shards = columns
        checks = np.zeros_like(numbers)
        return Index(first_words, second_words, starts, numbers, checks, shards), table["digest"]

    def _whole(self, name: str, most: int) -> bytes:
        """Return the content of a file of at most so many bytes."""
        with remote_errors(f"{self.url}/{name}"), self._open(name, 0, most + 1) as file:
            content = _read(file, most + 1)
        with self._plain_errors():
            if len(content) > most:
                raise ValueError(f"{name} has more than {size(most)}")
        self.received += len(content)
        return content

    def _has_ranges(self, name: str, length: int) -> bool:
        """Return whether a part of a file can be asked for; it is the last byte of this one."""
        with remote_errors(f"{self.url}/{name}"):
            try:
                with self._open(name, length - 1, length):
                    return True
            except _NoRangesError:
                return False

    def _ranges(self, name: str, part: Sequence[_Read]) -> Iterator[bytes]:
        """Yield the bytes of each read by a request of its own."""
        for read in part:
            with self._open(name, read.first, read.stop) as file:
                yield _read(file, read.stop - read.first)

    def _stream(self, name: str, part: Sequence[_Read]) -> Iterator[bytes]:
        """Yield the bytes of each read of a file that is sent from its beginning."""
        place = 0
        with self._open(name, 0, part[-1].stop) as file:
            for read in part:
                _read(file, read.first - place)
                yield _read(file, read.stop - read.first)
                place = read.stop

    def _check_stream(self, parts: Sequence[Sequence[_Read]]) -> None:
        """Check that shards which are read from their beginning are not too large."""
        streamed = sum(part[-1].stop for part in parts)
        if streamed > _LARGEST_STREAM:
            raise ReferenceModelError(
                "the server of a store sends whole files only",
                where=f"reference.behind: {self.url}",
                got=f"{size(streamed)} to download",
                expected=f"a server that sends ranges of files, or at most {size(_LARGEST_STREAM)}",
                remedy="copy the store to a folder, and name the folder in reference.behind",
            )

    def _open(self, name: str, first: int, stop: int) -> Any:
        """Open a file at its byte `first`, to read up to `stop`."""
        path = f"{self._path}/{name}"
        if not is_web(self.url):
            file = self._system.open(path, "rb", cache_type="none")
            file.seek(first)
            return file
        # fsspec would keep a reply in memory, however long it is; with a size it sends no request for that.
        asked = {"Range": f"bytes={first}-{stop - 1}", "Accept-Encoding": "identity"}
        file = self._system.open(path, "rb", block_size=0, size=1, headers=asked)
        if first and file.r.status != 206:
            file.close()
            raise _NoRangesError(f"{self.url} sends whole files")
        return file

    @contextlib.contextmanager
    def _logged_errors(self, name: str) -> Iterator[None]:
        """Log an error of the file system: entries that were not read are missing."""
        try:
            with remote_errors(f"{self.url}/{name}"):
                yield
        except DataError as error:
            log.warning("entries of a store are left out: %s: %s", error.where, error.got)

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Raise ReferenceModelError for a list or entries that are not what `push` writes."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
            raise ReferenceModelError(
                "a published store cannot be read",
                where=self.url,
                got=f"{type(fault).__name__}: {str(fault)[:200]}",
                remedy="leave it out of reference.behind; its owner can publish it again by `store push`",
            ) from fault


def _checked(name: str, space: Space) -> Space:
    """Return what a list says of a fingerprint. Raises ValueError, KeyError, TypeError."""
    width = fingerprint_in(space.space, name).width
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"{width!r} numbers of a token")
    if not isinstance(space.shards, list) or not all(map(_SHARD.fullmatch, space.shards)):
        raise ValueError("a shard with a name that is none")
    if not _NAME.fullmatch(space.entries):
        raise ValueError("entries with a name that is none")
    is_size = isinstance(space.bytes, int) and 0 < space.bytes <= _LARGEST_ENTRIES
    if not is_size or space.bytes % ENTRY.itemsize:
        raise ValueError(f"entries of {space.bytes!r} bytes")
    if not isinstance(space.numbers, int):
        raise TypeError(f"{space.numbers!r} numbers")
    if not isinstance(space.recipe, dict) or not isinstance(space.license, str):
        raise TypeError("a recipe or a license that is none")
    return space


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    """Return in words what is other in a store than in this run."""
    names = [name for name in here if there.get(name) != here[name]]
    return tuple(f"{name} {str(there.get(name))[:80]} (here {here[name]})" for name in names)


def _divide(index: Index, places: npt.NDArray[np.intp], most: int) -> list[list[_Read]]:
    """Return the reads of the entries at `places`; each part is of one shard, and has about `most` bytes."""
    starts = index.starts[places].astype(np.int64)
    ends = starts + 4 * index.tokens[places].astype(np.int64)
    shards = index.shards[places]
    parts = list[list[_Read]]()
    for row in np.lexsort((starts, shards)).tolist():
        start = int(starts[row])
        end = int(ends[row])
        part = parts[-1] if parts else []
        if not part or part[0].shard != shards[row] or end - part[0].first > most:
            parts.append([_Read(int(shards[row]), start, end, [row])])
        elif start > part[-1].stop + _GAP or end - part[-1].first > _REQUEST:
            part.append(_Read(int(shards[row]), start, end, [row]))
        else:
            part[-1].stop = max(part[-1].stop, end)
            part[-1].rows.append(row)
    return parts


def _read(file: Any, length: int) -> bytes:
    """Return the next `length` bytes of a file, fewer at its end; a connection may give some at a time."""
    parts = list[bytes]()
    while length > 0:
        part = file.read(min(length, _REQUEST))
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
