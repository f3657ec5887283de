"""Reference log-probs on disk: append-only shards of entries, found by content key, verified when read.

Shards are named by their content, so several jobs can fill one store at once. Opening a store reads
everything except the values.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

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
    is_intact,
    list_foreign,
    list_shards,
    open_shard,
    write_shard,
)

_Number = TypeVar("_Number", np.uint64, np.int64, np.uint32)

_KEYS_AT_ONCE = 1 << 16  # the entries of one look-up are Python objects


class Index:
    """Entries of many shards, sorted by the first words of their keys; 28 bytes each, values stay mapped.

    Attributes:
        damaged: number of look-ups whose values did not match their checksum, by number of the shard.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.damaged: Counter[int] = Counter()
        self._values = [shard.values for shard in shards]
        tokens = [np.diff(shard.ends, prepend=0) for shard in shards]
        shard_tokens = np.array([shard.tokens for shard in shards], dtype=np.int64)
        # Offset of each shard's values in the concatenation of all shards.
        self._first_values = np.cumsum(shard_tokens) - shard_tokens
        # As many bits as the number of tokens of the longest entry takes.
        self._token_bits = max((int(of.max(initial=0)) for of in tokens), default=0).bit_length()
        assert int(shard_tokens.sum()).bit_length() + self._token_bits < 64, (
            "4 TiB of entries of less than 8 million tokens fit"
        )
        # int64 [entries]: offset of an entry's values, shifted by `_token_bits`, plus its number of tokens.
        spans = [
            (shard.ends - of_entry + first_value) << self._token_bits | of_entry
            for shard, of_entry, first_value in zip(shards, tokens, self._first_values, strict=True)
        ]
        first_words = _joined([shard.keys[:, 0] for shard in shards], np.uint64)
        # Stable, so that of two entries of one key every rank takes the same: the one of the earlier shard.
        order = np.argsort(first_words, kind="stable")
        self._first_words = first_words[order]
        self._second_words = _joined([shard.keys[:, 1] for shard in shards], np.uint64)[order]
        self._spans = _joined(spans, np.int64)[order]
        self._checks = _joined([shard.checks.astype(np.uint32) for shard in shards], np.uint32)[order]

    def __len__(self) -> int:
        return len(self._first_words)

    def has_keys(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which `keys` have an entry, intact or not; bool [n]. Reads almost no values."""
        if not len(self):
            return np.zeros(len(keys), dtype=np.bool_)
        entries = np.searchsorted(self._first_words, keys[:, 0]).clip(max=len(self) - 1)
        found: npt.NDArray[np.bool_] = self._first_words[entries] == keys[:, 0]
        found &= self._second_words[entries] == keys[:, 1]
        # Few are left: keys whose first word is also that of another key.
        found[~found] = self.shards_of(keys[~found]) >= 0
        return found

    def shards_of(self, keys: Keys) -> Indices:
        """Return the number of the shard with an intact entry of each key, -1 for none; int64 [n]."""
        numbers: list[int] = []
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            _, shards = self.find(keys[start : start + _KEYS_AT_ONCE])
            numbers += [-1 if shard is None else shard for shard in shards]
        return np.array(numbers, dtype=np.int64)

    def find(self, keys: Keys) -> tuple[list[Values | None], list[int | None]]:
        """Return the values of each key and the number of their shard; None where no entry is intact."""
        values: list[Values | None] = [None] * len(keys)
        shards: list[int | None] = [None] * len(keys)
        wanted = np.arange(len(keys))
        entries = np.searchsorted(self._first_words, keys[:, 0])
        # Entries with equal first words are neighbours: try the next one for keys that are not found yet.
        while len(wanted):
            inside = entries < len(self)
            wanted, entries = wanted[inside], entries[inside]
            alike = self._first_words[entries] == keys[wanted, 0]
            wanted, entries = wanted[alike], entries[alike]
            same = self._second_words[entries] == keys[wanted, 1]
            self._load(entries[same], wanted[same].tolist(), values, shards)
            left = np.array([values[number] is None for number in wanted.tolist()], dtype=np.bool_)
            wanted, entries = wanted[left], entries[left] + 1
        return values, shards

    def _load(
        self, entries: Indices, numbers: list[int], values: list[Values | None], shards: list[int | None]
    ) -> None:
        """Set `values` and `shards` at `numbers` to those of `entries`, if they are intact."""
        spans, checks = self._spans[entries], self._checks[entries]
        starts = spans >> self._token_bits
        in_shards = np.searchsorted(self._first_values, starts, side="right") - 1
        starts -= self._first_values[in_shards]
        stops = starts + (spans & ((1 << self._token_bits) - 1))
        columns = (numbers, in_shards.tolist(), starts.tolist(), stops.tolist(), checks.tolist())
        for number, shard, start, stop, check in zip(*columns, strict=True):
            found = self._values[shard][start:stop]
            if is_intact(found, stop - start, check):
                values[number], shards[number] = found, shard
            else:
                self.damaged[shard] += 1


def _joined(arrays: Sequence[npt.NDArray[_Number]], dtype: type[_Number]) -> npt.NDArray[_Number]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays])


log = logging.getLogger(__name__)

PATIENCE_SECONDS = 90
"""How long another node's shard may stay invisible: NFS clients list a folder again after at most 60 s."""

_RETRY_SECONDS = 1.0


class LogpStore:
    """View of some shards of a store: response key to per-token float32 log-probs.

    An entry has one value per completion token, end-of-turn token included. Keys are uint64 [n, 2]
    (`data.encode.response_key`). Shards are named by their path below the root. Entries of the store's own
    fingerprint are preferred to those of compatible ones.

    Attributes:
        root: the store's folder (`reference.store`).
        fingerprints: the store's own, then compatible ones, the most similar first.
        folder: where the store's own shards are.
        shards: size in bytes of each shard in this view, by name.
        damaged: shards that fail verification; all their entries count as missing.
        foreign: files among the store's own shards that are not shards; known if all shards were opened.
    """

    def __init__(self, root: Path, fingerprints: Sequence[ReferenceFingerprint], names: Iterable[str]):
        self.root = root
        self.fingerprints = fingerprints
        self.folder = root / fingerprints[0].name
        names = list(names)
        with ThreadPoolExecutor(max_workers=8) as pool:
            opened = dict(zip(names, pool.map(lambda name: open_shard(root / name), names), strict=True))
        shards = {name: shard for name, shard in opened.items() if shard is not None}
        self.shards = {name: shard.bytes for name, shard in shards.items()}
        self.damaged = [name for name in opened if name not in shards]
        self.foreign: list[str] = []
        self._names = list(shards)
        self._index = Index(list(shards.values()))

    @classmethod
    def open(
        cls,
        root: Path,
        fingerprint: ReferenceFingerprint,
        names: Sequence[str] | None = None,
        compatible: Sequence[ReferenceFingerprint] = (),
    ) -> "LogpStore":
        """Open the entries of `fingerprint`.

        Args:
            root: `reference.store`.
            fingerprint: of the reference, its numerics and the scoring code.
            names: the shards to open; None opens all that exist now, and creates the folder.
            compatible: fingerprints whose entries are used where `fingerprint` has none, in this order.

        Raises:
            ReferenceModelError: the folder cannot be created or read.
        """
        fingerprints = [fingerprint, *compatible]
        try:
            if names is not None:
                return cls(root, fingerprints, names)
            for each in fingerprints:
                _mark_used(root / each.name, each)
            store = cls(root, fingerprints, _list_shards(root, fingerprints))
            store.foreign = [f"{fingerprint.name}/{name}" for name in list_foreign(store.folder)]
            for name in store.foreign:
                log.warning("%s is not a shard of the reference store and is ignored", root / name)
            return store
        except OSError as error:
            raise ReferenceModelError(
                "the reference store cannot be opened",
                where="reference.store",
                got=f"{root / fingerprint.name}: {error}",
                remedy="check that the folder exists, is readable, and is visible on every node",
            ) from error

    @classmethod
    def read_only(cls, root: Path, fingerprints: Sequence[ReferenceFingerprint]) -> "LogpStore":
        """Open all entries of `fingerprints` without creating or changing a file."""
        return cls(root, fingerprints, _list_shards(root, fingerprints))

    def reopen(self, names: Sequence[str] | None = None) -> "LogpStore":
        """Open other shards of the same store; as `open`."""
        own, *compatible = self.fingerprints
        return LogpStore.open(self.root, own, names, compatible)

    def wait_for(self, shards: Mapping[str, int]) -> "LogpStore":
        """Open these shards; waits a little for those that this node does not see completely yet.

        Args:
            shards: size in bytes of each shard, by name.

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
                    expected=f"shards that every node sees within {PATIENCE_SECONDS} seconds",
                    remedy="put reference.store on a file system that every node sees, and start again; "
                    "missing log-probs are computed before training",
                )
            time.sleep(_RETRY_SECONDS)
            self.list_now()  # listing a folder makes a network file system's client look for new files

    def list_now(self) -> list[str]:
        """Return the names of all shards that exist now, in this view or not."""
        return _list_shards(self.root, self.fingerprints)

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
        return list(self._index.find(keys)[0])

    def read(self, keys: Keys) -> list[Values]:
        """Return the log-probs of each key, float32 [completion tokens].

        Raises:
            ReferenceModelError: an entry is missing or damaged.
        """
        entries = []
        for key, values in zip(keys, self._index.find(keys)[0], strict=True):
            if values is None:
                raise ReferenceModelError(
                    "a reference log-prob that this run needs is missing or damaged",
                    where=str(self.folder),
                    got=f"entry {key[0]:016x}{key[1]:016x}{self._damage()}",
                    remedy="start the same command again: missing log-probs are computed before training",
                )
            entries.append(values)
        return entries

    def _damage(self) -> str:
        names = ", ".join(self.damaged_entries)
        return f"; damaged: {names}" if names else ""

    def write(self, keys: Keys, entries: Sequence[Values]) -> str:
        """Append entries as one shard, whole or not at all; visible to stores opened afterwards.

        Returns:
            The shard's name.

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


def _mark_used(folder: Path, fingerprint: ReferenceFingerprint) -> None:
    """Set the time of last use of a folder, and write its `space.json` if missing; warn if it is read-only.

    Raises:
        OSError: the folder does not exist and cannot be created.
    """
    try:
        if read_fingerprint(folder) is not None:
            os.utime(folder / FINGERPRINT_FILE)
            return
        if (folder / FINGERPRINT_FILE).exists():
            log.warning("%s is damaged and is written again", folder / FINGERPRINT_FILE)
        write_text(folder / FINGERPRINT_FILE, json.dumps(fingerprint.as_dict(), indent=1))
    except OSError as error:
        if not folder.is_dir():
            raise
        log.warning("the reference store is read, but cannot be written: %s", error)


def _list_shards(root: Path, fingerprints: Sequence[ReferenceFingerprint]) -> list[str]:
    """Return the shards of `fingerprints` by their path below `root`, in the order of the fingerprints."""
    names = []
    for fingerprint in fingerprints:
        with contextlib.suppress(FileNotFoundError):  # removed, or never created
            names += [f"{fingerprint.name}/{name}" for name in list_shards(root / fingerprint.name)]
    return names


def _folder_of(name: str) -> str:
    return name.split("/", maxsplit=1)[0]
