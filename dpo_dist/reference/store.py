"""Reference log-probs on disk: append-only shards of rows, found by content key, checked when read.

Shards are named by their content, so writers never meet, and several jobs fill one store at once. Opening
reads everything but the values.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dpo_dist.atomic import is_temporary, staged_file, write_text
from dpo_dist.errors import ReferenceError
from dpo_dist.reference.key import ReferenceSpace
from dpo_dist.reference.shard import SUFFIX, Keys, Shard, Values, open_shard, shard_name

_Number = TypeVar("_Number", np.uint64, np.int64, np.uint32)

_KEYS_AT_ONCE = 1 << 16  # the rows of a batch of look-ups are Python objects


@dataclass(frozen=True)
class _Index:
    """All rows in ascending order of their keys' first words; 28 bytes a row.

    Attributes:
        first_words: uint64 [rows], of the keys.
        second_words: uint64 [rows].
        places: int64 [rows], where a row's first value stands in the values of all shards laid end to end,
            shifted by `token_bits`, and in these its number of tokens.
        checks: uint32 [rows], checksums of the values.
        token_bits: as many as the longest row's number of tokens takes.
    """

    first_words: npt.NDArray[np.uint64]
    second_words: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    checks: npt.NDArray[np.uint32]
    token_bits: int


class LogpStore:
    """Rows of one reference space: response key to per-token float32 log-probs.

    A row holds one value per completion token, end-of-turn token included. Keys are uint64 [n, 2]
    (`data.encode.response_key`).
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = folder
        self.damaged: list[str] = []
        shards = []
        names = sorted(names)
        with ThreadPoolExecutor(max_workers=8) as pool:
            for name, shard in zip(
                names, pool.map(lambda name: open_shard(folder / name), names), strict=True
            ):
                if shard is None:
                    self.damaged.append(name)
                else:
                    shards.append(shard)
        self.names = [shard.name for shard in shards]
        """The shards this view of the store was opened with, damaged ones left out."""
        self._values = [shard.values for shard in shards]
        self._first_values = _first_values(shards)
        self._index = _build_index(shards, self._first_values)

    @classmethod
    def open(cls, root: Path, space: ReferenceSpace, names: Sequence[str] | None = None) -> "LogpStore":
        """Open the rows of `space` below `root`, creating its folder.

        Args:
            root: `reference.store`.
            space: reference and numerics.
            names: the shards to see, of another process's `names`; None: all that are there now.

        Raises:
            ReferenceError: the folder cannot be made or read.
        """
        folder = root / space.name
        try:
            if not (folder / "space.json").is_file():
                write_text(folder / "space.json", json.dumps(space.describe(), indent=1))
            if names is None:
                names = [file.name for file in folder.glob(f"*{SUFFIX}") if not is_temporary(file)]
            return cls(folder, names)
        except OSError as error:
            raise ReferenceError(
                "the reference store cannot be opened",
                where="reference.store",
                got=f"{folder}: {error}",
                remedy="check that the folder exists, can be written, and is seen by every node",
            ) from error

    def __len__(self) -> int:
        return len(self._index.first_words)

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of `keys` have a row whose checksum holds; bool [n]."""
        held = np.empty(len(keys), dtype=np.bool_)
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            part = slice(start, start + _KEYS_AT_ONCE)
            held[part] = [row is not None for row in self._find(keys[part])]
        return held

    def read(self, keys: Keys) -> list[Values]:
        """The rows of `keys`, float32 [completion tokens] each.

        Raises:
            ReferenceError: a row is missing or damaged.
        """
        rows = []
        for key, row in zip(keys, self._find(keys), strict=True):
            if row is None:
                raise ReferenceError(
                    "a reference log-prob that this run needs is missing or damaged",
                    where=str(self.folder),
                    got=f"row {key[0]:016x}{key[1]:016x}",
                    remedy="start the same command again: what is missing is computed before training",
                )
            rows.append(row)
        return rows

    def _find(self, keys: Keys) -> list[Values | None]:
        """The row of each key; None if no row with that key has values whose checksum holds."""
        found: list[Values | None] = [None] * len(keys)
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
            self._load(rows[same], wanted[same].tolist(), found)
            left = np.array([found[number] is None for number in wanted.tolist()], dtype=np.bool_)
            wanted, rows = wanted[left], rows[left] + 1
        return found

    def _load(self, rows: npt.NDArray[np.int64], numbers: list[int], found: list[Values | None]) -> None:
        """Put the values of these rows of the index into `found[numbers]`, where their checksums hold."""
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
            if zlib.crc32(values.data) == check:
                found[number] = values

    def write(self, keys: Keys, rows: Sequence[Values]) -> str:
        """Append rows as one shard, whole or not at all; visible to stores opened afterwards.

        Returns:
            The shard's name.

        Raises:
            ReferenceError: it cannot be written, or a value is not finite.
        """
        useless = sum(not np.isfinite(row).all() for row in rows)
        if useless:
            raise ReferenceError(
                "the reference model gives log-probs that are not finite",
                where="reference.path",
                got=f"{useless} of {len(rows)} responses",
                remedy="check the model's weights, and whether it needs model.dtype=fp32",
            )
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        rows = [np.ascontiguousarray(rows[i], dtype=np.float32) for i in order]
        keys = np.ascontiguousarray(keys[order])
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        checks = np.array([zlib.crc32(row.data) for row in rows], dtype=np.uint32)
        name = shard_name(keys, ends, checks)
        try:
            with staged_file(self.folder / name) as temporary:
                tensors = {"keys": keys, "ends": ends, "checks": checks, "values": np.concatenate(rows)}
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            raise ReferenceError(
                "a shard of reference log-probs cannot be written",
                where="reference.store",
                got=f"{self.folder / name}: {error}",
                remedy="make room or set another reference.store; finished shards are kept",
            ) from error
        return name


def _first_values(shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    """Where each shard's values start if all are laid end to end; int64 [shards]."""
    tokens = np.array([shard.ends[-1] if len(shard.ends) else 0 for shard in shards], dtype=np.int64)
    return np.cumsum(tokens) - tokens


def _build_index(shards: Sequence[Shard], first_values: npt.NDArray[np.int64]) -> _Index:
    tokens = [np.diff(shard.ends, prepend=0) for shard in shards]
    token_bits = max((int(of_shard.max(initial=0)) for of_shard in tokens), default=0).bit_length()
    values = sum(len(shard.values) for shard in shards)
    assert values.bit_length() + token_bits < 64, "4 TiB of rows of less than 8 million tokens have room"
    places = [
        (shard.ends - of_shard + first_value) << token_bits | of_shard
        for shard, of_shard, first_value in zip(shards, tokens, first_values, strict=True)
    ]
    first_words = _joined([shard.keys[:, 0] for shard in shards], np.uint64)
    # Stable: of rows of one key that two jobs have computed, every rank takes the same.
    order = np.argsort(first_words, kind="stable")
    return _Index(
        first_words[order],
        _joined([shard.keys[:, 1] for shard in shards], np.uint64)[order],
        _joined(places, np.int64)[order],
        _joined([shard.checks for shard in shards], np.uint32)[order],
        token_bits,
    )


def _joined(arrays: Sequence[npt.NDArray[_Number]], dtype: type[_Number]) -> npt.NDArray[_Number]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays])
