"""Reference log-probs on disk: append-only shards of entries, found by content key, verified when read.

Shards are named by their content, so that a shard is whole or absent whoever writes it. Opening a store reads
everything except the values.
"""

import json
import logging
import os
import socket
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from dpo_dist.batching.sampler import Indices
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.files import write_text
from dpo_dist.reference.fingerprint import FINGERPRINT_FILE, ReferenceFingerprint, read_fingerprint
from dpo_dist.reference.shard import (
    Keys,
    Shard,
    Values,
    list_foreign,
    list_shards,
    open_shard,
    write_shard,
)

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 90
"""How long another node's shard may stay invisible: NFS clients list a folder again after at most 60 s."""

_RETRY_SECONDS = 1.0
_KEYS_AT_ONCE = 1 << 16  # the entries of one look-up are Python objects


class Index:
    """Entries of many shards, sorted by the first words of their keys; 36 bytes each, values stay mapped.

    Attributes:
        damaged: number of look-ups whose values did not match their checksum, by number of the shard.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.damaged: Counter[int] = Counter()
        self._values = [shard.values for shard in shards]
        keys = np.concatenate([np.empty((0, 2), np.uint64), *(shard.keys for shard in shards)])
        stops = np.concatenate([np.empty(0, np.int64), *(shard.ends for shard in shards)])
        tokens = [np.diff(shard.ends, prepend=0).astype(np.int32) for shard in shards]
        checks = np.concatenate([np.empty(0, np.int64), *(shard.checks for shard in shards)])
        numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.keys) for shard in shards])
        # Stable, so that of two entries of one key every rank takes the same: the one of the earlier shard.
        order = np.argsort(keys[:, 0], kind="stable")
        self._first_words, self._second_words = keys[order, 0], keys[order, 1]
        self._shards, self._stops = numbers[order], stops[order]
        self._tokens = np.concatenate([np.empty(0, np.int32), *tokens])[order]
        self._checks = checks.astype(np.uint32)[order]

    def __len__(self) -> int:
        return len(self._first_words)

    def _matches(self, keys: Keys, is_found: npt.NDArray[np.bool_]) -> Iterator[tuple[Indices, Indices]]:
        """Yield indices of `keys` and of an entry of each: the earliest, then others until it is found."""
        wanted = np.arange(len(keys))
        entries = np.searchsorted(self._first_words, keys[:, 0])
        while len(wanted):
            inside = entries < len(self)
            wanted, entries = wanted[inside], entries[inside]
            alike = self._first_words[entries] == keys[wanted, 0]
            wanted, entries = wanted[alike], entries[alike]
            same = self._second_words[entries] == keys[wanted, 1]
            yield wanted[same], entries[same]
            left = ~is_found[wanted]
            wanted, entries = wanted[left], entries[left] + 1

    def has_keys(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which `keys` have an entry, intact or not; bool [n]. Reads no values."""
        found = np.zeros(len(keys), dtype=np.bool_)
        for numbers, _ in self._matches(keys, found):
            found[numbers] = True
        return found

    def find(self, keys: Keys) -> tuple[list[Values | None], Indices]:
        """Return the values of each key and the number of their shard; None and -1 if none is intact."""
        values: list[Values | None] = [None] * len(keys)
        shards, is_found = np.full(len(keys), -1), np.zeros(len(keys), dtype=np.bool_)
        for numbers, entries in self._matches(keys, is_found):
            columns = (self._shards, self._stops, self._tokens, self._checks)
            rows = zip(numbers.tolist(), *(column[entries].tolist() for column in columns), strict=True)
            for number, shard, stop, tokens, check in rows:
                found = self._values[shard][stop - tokens : stop]
                if zlib.crc32(found.data) == check:
                    values[number], shards[number], is_found[number] = found, shard, True
                else:
                    self.damaged[shard] += 1
        return values, shards

    def shards_of(self, keys: Keys) -> Indices:
        """Return the number of the shard with an intact entry of each key, -1 for none; int64 [n]."""
        parts = [keys[start : start + _KEYS_AT_ONCE] for start in range(0, len(keys), _KEYS_AT_ONCE)]
        return np.concatenate([np.empty(0, np.int64), *(self.find(part)[1] for part in parts)])


class LogpStore:
    """View of some shards of a store: response key to per-token float32 log-probs.

    An entry has one value per completion token, end-of-turn token included. Keys are uint64 [n, 2]
    (`data.encode.response_key`). Shards are named by their path below the root. Entries of the store's own
    fingerprint are preferred to those of compatible ones. Without `names` all shards are opened that exist;
    nothing is written.

    Attributes:
        root: the store's folder (`reference.store`).
        fingerprints: the store's own, then compatible ones, the most similar first.
        folder: where the store's own shards are.
        shards: size in bytes of each shard in this view, by name.
        damaged: shards that fail verification; all their entries count as missing.
        foreign: files among the store's own shards that are not shards; known after `open` without names.
    """

    def __init__(
        self, root: Path, fingerprints: Sequence[ReferenceFingerprint], names: Iterable[str] | None = None
    ):
        self.root, self.fingerprints = root, fingerprints
        self.folder = root / fingerprints[0].name
        self.foreign: list[str] = []
        names = list(self.list_now() if names is None else names)
        with ThreadPoolExecutor(max_workers=8) as pool:
            opened = dict(zip(names, pool.map(lambda name: open_shard(root / name), names), strict=True))
        shards = {name: shard for name, shard in opened.items() if shard is not None}
        self.shards = {name: shard.bytes for name, shard in shards.items()}
        self.damaged = [name for name in opened if name not in shards]
        self._names, self._index = list(shards), Index(list(shards.values()))

    @classmethod
    def open(
        cls,
        root: Path,
        fingerprint: ReferenceFingerprint,
        names: Sequence[str] | None = None,
        compatible: Sequence[ReferenceFingerprint] = (),
    ) -> "LogpStore":
        """Open the entries of `fingerprint`, and those of `compatible` ones where it has none.

        Without `names`, the folders are marked as used, and created if they are missing.

        Raises:
            ReferenceModelError: the folder cannot be created or read.
        """
        fingerprints = [fingerprint, *compatible]
        try:
            if names is None:
                for each in fingerprints:
                    _mark_used(root / each.name, each)
            store = cls(root, fingerprints, names)
            if names is None:
                store.foreign = [f"{fingerprint.name}/{name}" for name in list_foreign(store.folder)]
        except OSError as error:
            raise ReferenceModelError(
                "the reference store cannot be opened",
                where="reference.store",
                got=f"{root / fingerprint.name}: {error}",
                remedy="check that the folder exists, is readable, and is visible on every node",
            ) from error
        for name in store.foreign:
            log.warning("%s is not a shard of the reference store and is ignored", root / name)
        return store

    def reopen(self, names: Sequence[str] | None = None) -> "LogpStore":
        """Open other shards of the same store; as `open`."""
        own, *compatible = self.fingerprints
        return LogpStore.open(self.root, own, names, compatible)

    def wait_for(self, shards: Mapping[str, int]) -> "LogpStore":
        """Open these shards, of these sizes; waits a little for those that this node does not see yet.

        Raises:
            ReferenceModelError: a shard does not appear, or not with its size.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        order = [fingerprint.name for fingerprint in self.fingerprints]
        names = sorted(shards, key=lambda name: (order.index(_folder_of(name)), name))
        while True:
            store = self.reopen(names)
            unseen = sorted(name for name, size in shards.items() if store.shards.get(name) != size)
            if not unseen:
                return store
            if time.monotonic() > deadline:
                raise ReferenceModelError(
                    "shards of reference log-probs that this run uses cannot be read",
                    where=f"reference.store on {socket.gethostname()}",
                    got=f"{len(unseen)} of {len(shards)} missing or damaged: {self.root / unseen[0]}",
                    remedy="put reference.store on a file system that every node sees, and start again; "
                    "missing log-probs are computed before training",
                )
            time.sleep(_RETRY_SECONDS)
            self.list_now()  # listing a folder makes a network file system's client look for new files

    def list_now(self) -> list[str]:
        """Return the names of all shards that exist now, in this view or not, the own ones first."""
        folders = [each.name for each in self.fingerprints if (self.root / each.name).is_dir()]
        return [f"{folder}/{name}" for folder in folders for name in list_shards(self.root / folder)]

    def check_writable(self) -> None:
        """Check, before hours of scoring, that entries can be stored.

        Raises:
            ReferenceModelError: the folder is read-only.
        """
        if not os.access(self.folder, os.W_OK):
            raise ReferenceModelError(
                "the reference store lacks log-probs that this run needs, and cannot be written",
                where="reference.store",
                got=f"{self.folder} is read-only",
                remedy="fix the permissions, or set another reference.store",
            )

    def __len__(self) -> int:
        return len(self._index)

    @property
    def damaged_entries(self) -> dict[str, int]:
        """Number of look-ups so far whose values failed their checksum, by shard."""
        return {self._names[number]: count for number, count in self._index.damaged.items()}

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which `keys` have an intact entry; bool [n]. Reads and verifies their values."""
        found: npt.NDArray[np.bool_] = self._index.shards_of(keys) >= 0
        return found

    def has_keys(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which `keys` have an entry; bool [n]. Reads no values, so the entry may be damaged."""
        return self._index.has_keys(keys)

    def sources(self, keys: Keys) -> Indices:
        """Return the index in `fingerprints` of each key's entry, -1 for none; int64 [n]."""
        folders = [fingerprint.name for fingerprint in self.fingerprints]
        by_shard = [folders.index(_folder_of(name)) for name in self._names]
        # The last one is that of shard number -1: no entry.
        return np.array([*by_shard, -1], dtype=np.int64)[self._index.shards_of(keys)]

    def find(self, keys: Keys) -> list[Values | None]:
        """Return the log-probs of each key, float32 [completion tokens]; None if missing or damaged."""
        return self._index.find(keys)[0]

    def read(self, keys: Keys) -> list[Values]:
        """Return the log-probs of each key, float32 [completion tokens].

        Raises:
            ReferenceModelError: an entry is missing or damaged.
        """
        entries = []
        for key, values in zip(keys, self.find(keys), strict=True):
            if values is None:
                damaged = ", ".join(self.damaged_entries)
                raise ReferenceModelError(
                    "a reference log-prob that this run needs is missing or damaged",
                    where=str(self.folder),
                    got=f"entry {key[0]:016x}{key[1]:016x}" + (f"; damaged: {damaged}" if damaged else ""),
                    remedy="start the same command again: missing log-probs are computed before training",
                )
            entries.append(values)
        return entries

    def write(self, keys: Keys, entries: Sequence[Values]) -> str:
        """Append entries as one shard, whole or not at all, and return its name; later stores see it.

        Raises:
            ReferenceModelError: it cannot be written, or a value is not finite.
        """
        not_finite = sum(not np.isfinite(values).all() for values in entries)
        if not_finite:
            raise ReferenceModelError(
                "the reference model computes log-probs that are not finite",
                where="reference.path (null: model.path)",
                got=f"{not_finite} of {len(entries)} responses",
                remedy="check the model's weights, and whether it needs model.dtype=fp32",
            )
        try:
            return f"{self.folder.name}/{write_shard(self.folder, keys, entries)}"
        except (OSError, SafetensorError) as error:
            raise ReferenceModelError(
                "a shard of reference log-probs cannot be written",
                where="reference.store",
                got=f"{self.folder}: {error}",
                remedy="free disk space or set another reference.store; finished shards are kept",
            ) from error


def first_of_each(keys: Keys) -> Indices:
    """Return the index of the first occurrence of each distinct key, in the order of keys (fast look-up)."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    new = np.ones(len(keys), dtype=np.bool_)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return order[new]


def _mark_used(folder: Path, fingerprint: ReferenceFingerprint) -> None:
    """Set the time of last use of a folder, and write its `space.json` if missing; warn if it is read-only.

    Raises:
        OSError: the folder does not exist and cannot be created.
    """
    try:
        if read_fingerprint(folder) is not None:
            os.utime(folder / FINGERPRINT_FILE)
        else:
            write_text(folder / FINGERPRINT_FILE, json.dumps(fingerprint.as_dict(), indent=1))
    except OSError as error:
        if not folder.is_dir():
            raise
        log.warning("the reference store is read, but cannot be written: %s", error)


def _folder_of(name: str) -> str:
    return name.split("/", maxsplit=1)[0]
