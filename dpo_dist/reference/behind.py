"""Published stores behind the local one, of which entries are fetched rather than computed.

A stranger's store is data that is checked: its list is JSON, its entries are rows of numbers, and the headers
of its shards are never read. An entry that cannot be that of the run's response counts as missing.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from dpo_dist.batching.content_keys import Keys
from dpo_dist.foundation.background import prefetch
from dpo_dist.foundation.errors import DataError, ReferenceModelError, in_one_line
from dpo_dist.foundation.remote import is_web, remote_errors
from dpo_dist.foundation.text import size
from dpo_dist.reference.index import Index
from dpo_dist.reference.published import ENTRY, LIST, open_place, values_digest
from dpo_dist.reference.store import ReferenceFingerprint, StoredLogps, fingerprint_in

log = logging.getLogger(__name__)

_LARGEST_LIST = 2**24
_LARGEST_ENTRIES = 2**32
_LARGEST_PLACE = 2**48
_LARGEST_WHOLE = 2**30
_GAP = 2**16  # between two entries; up to it they are one request
_REQUEST = 2**23
_FEW = 0.1  # of what was asked, below which the run says what may be the cause
_PARTIAL = 206  # the status of a reply with a range
_THREADS = 8
_ROUNDING = 1e-3  # of the log-prob 0


def fault_of_logps(values: StoredLogps) -> str:
    """Return, in words, why values cannot be log-probs; "" if they can."""
    is_logp = np.isfinite(values) & (values <= _ROUNDING)
    return "" if is_logp.all() else f"the log-prob {values[~is_logp][0]:g}"


class Space(BaseModel, extra="forbid"):
    """What a list says of a fingerprint: its `space.json`, shards, entries by digest and bytes, numbers.

    `recipe`: what decided the token ids of the run that scored last.
    """

    space: dict[str, Any]
    shards: list[Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.safetensors$")]]
    entries: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    bytes: Annotated[int, Field(gt=0, le=_LARGEST_ENTRIES, multiple_of=ENTRY.itemsize)]
    numbers: int
    recipe: dict[str, Any]
    license: str


class _List(BaseModel):
    """The content of the list."""

    format: Literal[1]
    fingerprints: dict[str, Space]


@dataclass
class _Read:
    """A part of a shard's file, with these of the wanted entries."""

    shard: int
    first: int
    stop: int
    rows: list[int]


@dataclass
class Behind:
    """A published store, and counts of what was asked.

    Making one sends no request. Raises ConfigError: the URL cannot be used, or its package is missing.

    Attributes:
        url: a folder or a URL.
        responses: those that were asked for.
        entries: those that were found.
        bytes_read: of the list, of tables of entries and of shards.
        left_out: entries that were wrong or could not be downloaded.
        differences: in words, where few were found, what is other there than in this run.
    """

    url: str
    responses: int = 0
    entries: int = 0
    bytes_read: int = 0
    left_out: int = 0
    differences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._system, self._path = open_place(self.url)

    def spaces(self) -> list[tuple[ReferenceFingerprint, Space]]:
        """Return the fingerprints in the list. Raises DataError, ReferenceModelError."""
        content = self._whole(LIST, _LARGEST_LIST)
        with self._plain_errors():
            spaces = _List.model_validate_json(content).fingerprints
            return [(fingerprint_in(space.space, name), space) for name, space in spaces.items()]

    def find(
        self,
        fingerprint: ReferenceFingerprint,
        keys: Keys,
        tokens: npt.NDArray[np.int64],
        fault: Callable[[StoredLogps], str],
        recipe: Mapping[str, Any],
        *,
        rounding: bool = False,
    ) -> Iterator[tuple[ReferenceFingerprint, int, StoredLogps]]:
        """Yield the place in `keys` of each that the store has, with its fingerprint and values.

        `tokens`: of the response of each key. Left out are values of which `fault` returns words, and those
        that cannot be downloaded. `recipe`: what decides the token ids of this run. With `rounding`, what
        `fingerprint` lacks is looked for under those that differ by rounding. Raises DataError,
        ReferenceModelError: the list or the entries cannot be read.
        """
        self.responses += len(keys)
        of_model = [each for each in self.spaces() if each[0].reference == fingerprint.reference]
        accepted = [each for each in of_model if each[0] == fingerprint]
        if rounding:
            accepted += [each for each in of_model if each[0].rounds(fingerprint)]
        is_missing = np.ones(len(keys), np.bool_)
        for other, space in accepted:
            rest = np.flatnonzero(is_missing)
            if not len(rest):
                break
            for row, values in self._find(other, space, keys[rest], tokens[rest], fault):
                is_missing[rest[row]] = False
                yield other, int(rest[row]), values
        self.differences = ()
        if self.entries < _FEW * self.responses:
            differences = [_differences(space.recipe, recipe) or ("the token ids",) for _, space in accepted]
            if not accepted:
                differences = [_differences(other.profile, fingerprint.profile) for other, _ in of_model]
            # Without words for another model: the list may be that of the run's teacher.
            self.differences = min(differences, key=len, default=())

    def _find(
        self,
        fingerprint: ReferenceFingerprint,
        space: Space,
        keys: Keys,
        tokens: npt.NDArray[np.int64],
        fault: Callable[[StoredLogps], str],
    ) -> Iterator[tuple[int, StoredLogps]]:
        index, digests = self._entries(fingerprint.name, space)
        places, stops = index.locate(keys)
        found = np.flatnonzero(places < stops)
        places = places[found]
        # The lengths are known: what is longer is not read.
        fits = index.tokens[places] == fingerprint.width * tokens[found]
        fits &= (index.shards[places] < len(space.shards)) & (index.starts[places] < _LARGEST_PLACE)
        self.left_out += int((~fits).sum())
        found = found[fits]
        places = places[fits]
        has_ranges = self._has_ranges(f"{fingerprint.name}/{space.entries}.entries", space.bytes)
        reads = _reads(index, places, has_ranges=has_ranges)
        if not has_ranges:
            self._check_whole(reads)

        def fetch(read: _Read) -> bytes:
            return self._logged(f"{fingerprint.name}/{space.shards[read.shard]}", read)

        def checked(read: _Read, content: bytes) -> dict[int, StoredLogps]:
            """Return the entries of a read that are right, by their places in `keys`."""
            entries = dict[int, StoredLogps]()
            for row in read.rows:
                start = int(index.starts[places[row]]) - read.first
                values = memoryview(content)[start : start + 4 * int(index.tokens[places[row]])]
                if values_digest(values) == digests[places[row]].tobytes():
                    entry = np.frombuffer(values, "<f4")
                    entry = entry if fingerprint.width == 1 else entry.reshape(-1, fingerprint.width)
                    if not fault(entry):
                        entries[int(found[row])] = entry
            self.bytes_read += read.stop - read.first * has_ranges
            self.entries += len(entries)
            self.left_out += len(read.rows) - len(entries)
            return entries

        groups = [reads[begin : begin + _THREADS] for begin in range(0, len(reads), _THREADS)]
        with ThreadPoolExecutor(_THREADS) as pool:
            # Threads wait for replies; one alone checks them, as more would wait for Python's lock. In memory
            # are the values of a few groups: those that are read, checked, and written by the caller.
            contents = (zip(group, pool.map(fetch, group), strict=True) for group in groups)
            with prefetch((list(each) for each in contents), 1) as downloaded:
                of_reads = itertools.starmap(checked, itertools.chain.from_iterable(downloaded))
                with prefetch(of_reads, _THREADS) as right:
                    for entries in right:
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
        with remote_errors(f"{self.url}/{name}"):
            content = self._part(name, 0, most + 1)
        with self._plain_errors():
            if len(content) > most:
                raise ValueError(f"{name} has more than {size(most)}")
        self.bytes_read += len(content)
        return content

    def _has_ranges(self, name: str, length: int) -> bool:
        """Return whether a part of a file can be asked for; it is the last byte of this one."""
        with remote_errors(f"{self.url}/{name}"):
            file, place = self._open(name, length - 1, length)
            file.close()
        return place > 0

    def _logged(self, name: str, read: _Read) -> bytes:
        """Return the bytes of a read; nothing after an error of the file system, which is logged."""
        try:
            with remote_errors(f"{self.url}/{name}"):
                return self._part(name, read.first, read.stop)
        except DataError as error:
            log.warning("entries of a store are left out: %s: %s", error.where, error.got)
            return b""

    def _part(self, name: str, first: int, stop: int) -> bytes:
        """Return bytes of a file, fewer at its end, and never more."""
        file, place = self._open(name, first, stop)
        parts = list[bytes]()
        with file:
            while place < stop:
                part = file.read(min(stop - place, _REQUEST))  # a connection may give some at a time
                if not part:
                    break
                parts.append(part[max(0, first - place) :])
                place += len(part)
        return b"".join(parts)

    def _check_whole(self, reads: Sequence[_Read]) -> None:
        """Check that shards which are read from their beginning are not too large."""
        whole = sum(read.stop for read in reads)
        if whole > _LARGEST_WHOLE:
            raise ReferenceModelError(
                "the server of a store sends whole files only",
                where=f"reference.behind: {self.url}",
                got=f"{size(whole)} to download",
                expected=f"a server that sends ranges of files, or at most {size(_LARGEST_WHOLE)}",
                remedy="copy the store to a folder, and name the folder in reference.behind",
            )

    def _open(self, name: str, first: int, stop: int) -> tuple[Any, int]:
        """Open a file to read up to `stop`, and return it with the place where it begins: `first`, or 0."""
        path = f"{self._path}/{name}"
        if not is_web(self.url):
            file = self._system.open(path, "rb", cache_type="none")
            file.seek(first)
            return file, first
        # fsspec would keep a reply in memory, however long it is; with a size it sends no request for that.
        asked = {"Range": f"bytes={first}-{stop - 1}", "Accept-Encoding": "identity"}
        file = self._system.open(path, "rb", block_size=0, size=1, headers=asked)
        return file, first if file.r.status == _PARTIAL else 0

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Raise ReferenceModelError for a list or entries that are not what `push` writes."""
        try:
            yield
        except (ValueError, KeyError, TypeError) as fault:
            raise ReferenceModelError(
                "a published store cannot be read",
                where=self.url,
                got=in_one_line(fault)[:300],
                remedy="leave it out of reference.behind; its owner can publish it again by `store push`",
            ) from fault


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    """Return in words what is other in a store than in this run."""
    names = [name for name in here if there.get(name) != here[name]]
    return tuple(f"{name} {str(there.get(name))[:80]} (here {here[name]})" for name in names)


def _reads(index: Index, places: npt.NDArray[np.intp], *, has_ranges: bool) -> list[_Read]:
    """Return the reads of the entries at `places`; without ranges a shard is one read."""
    starts = index.starts[places].astype(np.int64)
    ends = starts + 4 * index.tokens[places].astype(np.int64)
    shards = index.shards[places]
    reads = list[_Read]()
    for row in np.lexsort((starts, shards)).tolist():
        start = int(starts[row])
        end = int(ends[row])
        last = reads[-1] if reads else None
        is_near = last is not None and start <= last.stop + _GAP and end <= last.first + _REQUEST
        if last is not None and last.shard == shards[row] and (is_near or not has_ranges):
            last.stop = max(last.stop, end)
            last.rows.append(row)
        else:
            reads.append(_Read(int(shards[row]), start, end, [row]))
    return reads
