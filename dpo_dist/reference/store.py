"""Reference log-probs on disk: append-only shards of rows, found by content key, checked when read.

Shards are named by their content, so writers never meet, and several jobs fill one store at once. Opening
reads everything but the values.
"""

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from dpo_dist.atomic import write_text
from dpo_dist.errors import ReferenceModelError
from dpo_dist.reference.fingerprint import FINGERPRINT_FILE, ReferenceFingerprint, read_fingerprint
from dpo_dist.reference.index import build_index, first_values
from dpo_dist.reference.shard import (
    Keys,
    Values,
    holds,
    list_foreign,
    list_shards,
    open_shard,
    write_shard,
)

log = logging.getLogger(__name__)

_KEYS_AT_ONCE = 1 << 16  # the rows of a batch of look-ups are Python objects


class LogpStore:
    """Rows of one reference: response key to per-token float32 log-probs.

    A row holds one value per completion token, end-of-turn token included. Keys are uint64 [n, 2]
    (`data.encode.response_key`). Shards are named by their path below the root: space and file. Rows of the
    store's own space are preferred to those of its kin.
    """

    def __init__(self, root: Path, spaces: Sequence[ReferenceFingerprint], names: Iterable[str]):
        self.root = root
        self.folder = root / spaces[0].name
        self.spaces = spaces
        """Its own space, and those of its kin."""
        self.damaged: list[str] = []
        """Shards whose index does not hold: all their rows count as missing."""
        self.damaged_rows: Counter[str] = Counter()
        """Rows that were looked up and whose values do not hold, by shard."""
        shards = []
        names = list(names)
        with ThreadPoolExecutor(max_workers=8) as pool:
            for name, shard in zip(names, pool.map(lambda name: open_shard(root / name), names), strict=True):
                if shard is None:
                    self.damaged.append(name)
                else:
                    shards.append((name, shard))
        self.foreign: list[str] = []
        """What lies among the shards of the own space and is none; known where all shards were asked for."""
        self.names = [name for name, _ in shards]
        """The shards this view of the store was opened with, damaged ones left out."""
        self.shard_bytes = {name: shard.bytes for name, shard in shards}
        """Size of each of them."""
        self._values = [shard.values for _, shard in shards]
        self._first_values = first_values([shard for _, shard in shards])
        self._index = build_index([shard for _, shard in shards], self._first_values)

    @classmethod
    def open(
        cls,
        root: Path,
        space: ReferenceFingerprint,
        names: Sequence[str] | None = None,
        compatible: Sequence[ReferenceFingerprint] = (),
    ) -> "LogpStore":
        """Open the rows of `space` below `root`, creating its folder.

        Args:
            root: `reference.store`.
            space: reference and numerics.
            names: the shards to see, of another process's `names`; None: all that are there now.
            compatible: other spaces whose rows may serve where `space` has none, the nearest first.

        Raises:
            ReferenceModelError: the folder cannot be made or read.
        """
        spaces = [space, *compatible]
        try:
            if names is not None:
                return cls(root, spaces, names)
            for each in spaces:
                _enter(root / each.name, each)
            store = cls(root, spaces, list_stored(root, spaces))
            store.foreign = [f"{space.name}/{name}" for name in list_foreign(store.folder)]
            for name in store.foreign:
                log.warning("%s is no shard of the reference store and is passed over", root / name)
            return store
        except OSError as error:
            raise ReferenceModelError(
                "the reference store cannot be opened",
                where="reference.store",
                got=f"{root / space.name}: {error}",
                remedy="check that the folder exists, can be read, and is seen by every node",
            ) from error

    def list_now(self) -> list[str]:
        """The shards that there are now, in this view or not."""
        return list_stored(self.root, self.spaces)

    def check_writable(self) -> None:
        """Say before hours of computing what could not be stored.

        Raises:
            ReferenceModelError: the own space is read-only.
        """
        if not os.access(self.folder, os.W_OK):
            raise ReferenceModelError(
                "the reference store lacks rows that this run needs, and cannot be written",
                where="reference.store",
                got=f"{self.folder} is read-only",
                remedy="mend the permissions, or set another reference.store",
            )

    def __len__(self) -> int:
        return len(self._index.first_words)

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of `keys` have a row whose checksum holds; bool [n]."""
        held = np.empty(len(keys), dtype=np.bool_)
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            part = slice(start, start + _KEYS_AT_ONCE)
            held[part] = [shard is not None for shard in self._find(keys[part])[1]]
        return held

    def indexed(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of `keys` have a row; bool [n]. Reads no values: whether these hold, `holds` knows."""
        rows = np.searchsorted(self._index.first_words, keys[:, 0]).clip(max=len(self) - 1)
        if not len(self):
            return np.zeros(len(keys), dtype=np.bool_)
        found: npt.NDArray[np.bool_] = self._index.first_words[rows] == keys[:, 0]
        found &= self._index.second_words[rows] == keys[:, 1]
        # Few are left: those of which another row has the first word.
        found[~found] = self.contains(keys[~found])
        return found

    def sources(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Which of `spaces` serves each of `keys`, -1 for none; int64 [n]."""
        numbers = {space.name: number for number, space in enumerate(self.spaces)}
        of_shards = [numbers[name.split("/")[0]] for name in self.names]
        serving: list[int] = []
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            _, shards = self._find(keys[start : start + _KEYS_AT_ONCE])
            serving += [-1 if shard is None else of_shards[shard] for shard in shards]
        return np.array(serving, dtype=np.int64)

    def read(self, keys: Keys) -> list[Values]:
        """The rows of `keys`, float32 [completion tokens] each.

        Raises:
            ReferenceModelError: a row is missing or damaged.
        """
        rows = []
        for key, row in zip(keys, self._find(keys)[0], strict=True):
            if row is None:
                raise ReferenceModelError(
                    "a reference log-prob that this run needs is missing or damaged",
                    where=str(self.folder),
                    got=f"row {key[0]:016x}{key[1]:016x}",
                    remedy="start the same command again: what is missing is computed before training",
                )
            rows.append(row)
        return rows

    def _find(self, keys: Keys) -> tuple[list[Values | None], list[int | None]]:
        """The row of each key and the number of its shard; None where no row has values that hold."""
        found: list[Values | None] = [None] * len(keys)
        holders: list[int | None] = [None] * len(keys)
        wanted = np.arange(len(keys))
        index = self._index
        rows = np.searchsorted(index.first_words, keys[:, 0])
        # Rows of equal first words lie side by side: another round for those whose row was not this one.
        while len(wanted):
            inside = rows < len(self)
            wanted, rows = wanted[inside], rows[inside]
            alike = index.first_words[rows] == keys[wanted, 0]
            wanted, rows = wanted[alike], rows[alike]
            same = index.second_words[rows] == keys[wanted, 1]
            self._load(rows[same], wanted[same].tolist(), found, holders)
            left = np.array([found[number] is None for number in wanted.tolist()], dtype=np.bool_)
            wanted, rows = wanted[left], rows[left] + 1
        return found, holders

    def _load(
        self,
        rows: npt.NDArray[np.int64],
        numbers: list[int],
        found: list[Values | None],
        holders: list[int | None],
    ) -> None:
        """Put these rows of the index, where their values hold, into `found` and `holders` at `numbers`."""
        places, checks, token_bits = (
            self._index.places[rows],
            self._index.checks[rows],
            self._index.token_bits,
        )
        starts = places >> token_bits
        shards = np.searchsorted(self._first_values, starts, side="right") - 1
        starts -= self._first_values[shards]
        stops = starts + (places & ((1 << token_bits) - 1))
        columns = (numbers, shards.tolist(), starts.tolist(), stops.tolist(), checks.tolist())
        for number, shard, start, stop, check in zip(*columns, strict=True):
            values = self._values[shard][start:stop]
            if holds(values, stop - start, check):
                found[number], holders[number] = values, shard
            else:
                self.damaged_rows[self.names[shard]] += 1

    def write(self, keys: Keys, rows: Sequence[Values]) -> str:
        """Append rows as one shard, whole or not at all; visible to stores opened afterwards.

        Returns:
            The shard's name.

        Raises:
            ReferenceModelError: it cannot be written, or a value is not finite.
        """
        useless = sum(not np.isfinite(row).all() for row in rows)
        if useless:
            raise ReferenceModelError(
                "the reference model gives log-probs that are not finite",
                where="reference.path",
                got=f"{useless} of {len(rows)} responses",
                remedy="check the model's weights, and whether it needs model.dtype=fp32",
            )
        try:
            return f"{self.folder.name}/{write_shard(self.folder, keys, rows)}"
        except (OSError, SafetensorError) as error:
            raise ReferenceModelError(
                "a shard of reference log-probs cannot be written",
                where="reference.store",
                got=f"{self.folder}: {error}",
                remedy="make room or set another reference.store; finished shards are kept",
            ) from error


def _enter(folder: Path, space: ReferenceFingerprint) -> None:
    """Have the folder say what it holds, and when it was last used; one that is read-only may still be read.

    Raises:
        OSError: it is not there and cannot be made.
    """
    try:
        if read_fingerprint(folder) is not None:
            os.utime(folder / FINGERPRINT_FILE)
            return
        if (folder / FINGERPRINT_FILE).exists():
            log.warning("%s is damaged and is written anew", folder / FINGERPRINT_FILE)
        write_text(folder / FINGERPRINT_FILE, json.dumps(space.describe(), indent=1))
    except OSError as error:
        if not folder.is_dir():
            raise
        log.warning("the reference store is used as it is and not written to: %s", error)


def list_stored(root: Path, spaces: Sequence[ReferenceFingerprint]) -> list[str]:
    """All shards of `spaces` by their path below `root`, in the order of the spaces."""
    names = []
    for space in spaces:
        with contextlib.suppress(FileNotFoundError):  # dropped, or never made
            names += [f"{space.name}/{name}" for name in list_shards(root / space.name)]
    return names
