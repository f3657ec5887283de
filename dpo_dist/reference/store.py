"""Reference log-probs on disk: append-only shards of rows, found by content key, checked when read.

A shard is one safetensors file: sorted keys, where each row's values end, a checksum per row, and the float32
values of all rows. Its name is the digest of everything but the values, which the checksums cover; so a shard
is verified from its own name, writers never meet, and several jobs fill one store at once. Opening reads
everything but the values.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dpo_dist.atomic import is_temporary, staged_file, write_text
from dpo_dist.errors import ReferenceError
from dpo_dist.reference.key import ReferenceSpace

log = logging.getLogger(__name__)

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float32]

_Number = TypeVar("_Number", np.uint64, np.int64, np.uint32, np.float32)

_SUFFIX = ".safetensors"
# Where a row lies and what its key and checksum are; with the key's first word, 28 bytes a row in memory.
# `place` is where its first value stands in the values of all shards laid end to end, shifted by as many bits
# as the longest row's number of tokens takes, and in these its own number of tokens.
_ROW = np.dtype([("second_word", np.uint64), ("place", np.int64), ("check", np.uint32)])
_KEYS_AT_ONCE = 1 << 16  # the rows of a batch of look-ups are Python objects


@dataclass(frozen=True)
class _Shard:
    """One shard, mapped: keys uint64 [rows, 2], where values end, checksums, and the values."""

    name: str
    keys: Keys
    ends: npt.NDArray[np.int64]
    checks: npt.NDArray[np.uint32]
    values: Values


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
                names, pool.map(lambda name: _open_shard(folder / name), names), strict=True
            ):
                if shard is None:
                    self.damaged.append(name)
                else:
                    shards.append(shard)
        self.names = [shard.name for shard in shards]
        """The shards this view of the store was opened with, damaged ones left out."""
        self._values = [shard.values for shard in shards]
        self._first_values = _first_values(shards)
        self._token_bits = _token_bits(shards)
        self._first_words, self._rows = _build_index(shards, self._first_values, self._token_bits)

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
                names = [file.name for file in folder.glob(f"*{_SUFFIX}") if not is_temporary(file)]
            return cls(folder, names)
        except OSError as error:
            raise ReferenceError(
                "the reference store cannot be opened",
                where="reference.store",
                got=f"{folder}: {error}",
                remedy="check that the folder exists, can be written, and is seen by every node",
            ) from error

    def __len__(self) -> int:
        return len(self._first_words)

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
        places = np.searchsorted(self._first_words, keys[:, 0])
        # Rows of equal first words lie side by side: another round for those whose row was not this one.
        while len(wanted):
            inside = places < len(self)
            wanted, places = wanted[inside], places[inside]
            alike = self._first_words[places] == keys[wanted, 0]
            wanted, places = wanted[alike], places[alike]
            rows = self._rows[places]
            same = rows["second_word"] == keys[wanted, 1]
            self._load(rows[same], wanted[same].tolist(), found)
            left = np.array([found[number] is None for number in wanted.tolist()], dtype=np.bool_)
            wanted, places = wanted[left], places[left] + 1
        return found

    def _load(self, rows: npt.NDArray[np.void], numbers: list[int], found: list[Values | None]) -> None:
        """Put the values of `rows` into `found[numbers]`, where their checksums hold."""
        starts = rows["place"] >> self._token_bits
        shards = np.searchsorted(self._first_values, starts, side="right") - 1
        starts -= self._first_values[shards]
        stops = starts + (rows["place"] & ((1 << self._token_bits) - 1))
        columns = (numbers, shards.tolist(), starts.tolist(), stops.tolist(), rows["check"].tolist())
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
        name = _index_digest(keys, ends, checks) + _SUFFIX
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


def _index_digest(keys: Keys, ends: npt.NDArray[np.int64], checks: npt.NDArray[np.uint32]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in (keys, ends, checks):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _first_values(shards: Sequence[_Shard]) -> npt.NDArray[np.int64]:
    """Where each shard's values start if all are laid end to end; int64 [shards]."""
    tokens = np.array([shard.ends[-1] if len(shard.ends) else 0 for shard in shards], dtype=np.int64)
    return np.cumsum(tokens) - tokens


def _token_bits(shards: Sequence[_Shard]) -> int:
    """Bits of the number of tokens of the longest row."""
    longest = max((int(np.diff(shard.ends, prepend=0).max(initial=0)) for shard in shards), default=0)
    bits = longest.bit_length()
    values = sum(len(shard.values) for shard in shards)
    assert bits + values.bit_length() < 64, "2**40 values, 4 TiB, of rows of less than 2**23 tokens have room"
    return bits


def _build_index(
    shards: Sequence[_Shard], first_values: npt.NDArray[np.int64], token_bits: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.void]]:
    """The first words of all keys in ascending order, and their rows (`_ROW`)."""
    first_words = np.empty(sum(len(shard.keys) for shard in shards), dtype=np.uint64)
    rows = np.empty(len(first_words), dtype=_ROW)
    start = 0
    for shard, first_value in zip(shards, first_values, strict=True):
        part = slice(start, start + len(shard.keys))
        tokens = np.diff(shard.ends, prepend=0)
        first_words[part], rows["second_word"][part] = shard.keys.T
        rows["place"][part] = (shard.ends - tokens + first_value) << token_bits | tokens
        rows["check"][part] = shard.checks
        start = part.stop
    # Stable: of rows of one key that two jobs have computed, every rank takes the same.
    order = np.argsort(first_words, kind="stable")
    return first_words[order], rows[order]


def _open_shard(file: Path) -> _Shard | None:
    """Map a shard and verify its index against its name; None, with a warning, if it does not hold.

    Raises:
        OSError: the file is there and cannot be mapped.
    """
    try:
        shard = _parse_shard(file.name, _map(file))
        if _index_digest(shard.keys, shard.ends, shard.checks) + _SUFFIX == file.name:
            return shard
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("shard %s cannot be read: %s", file, error)
    log.warning("shard %s is damaged; its rows count as missing", file)
    return None


def _parse_shard(name: str, content: npt.NDArray[np.uint8]) -> _Shard:
    """Find the tensors in a safetensors file; of its header only the places count, the types are ours."""
    header_bytes = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + header_bytes].tobytes())

    def tensor(name: str, dtype: type[_Number]) -> npt.NDArray[_Number]:
        start, stop = header[name]["data_offsets"]
        return content[8 + header_bytes :][start:stop].view(dtype)

    shard = _Shard(
        name,
        tensor("keys", np.uint64).reshape(-1, 2),
        tensor("ends", np.int64),
        tensor("checks", np.uint32),
        tensor("values", np.float32),
    )
    if not len(shard.keys) == len(shard.ends) == len(shard.checks):
        raise ValueError("keys, ends and checksums are not of the same rows")
    return shard


def _map(file: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, mapped. Unlike `numpy.memmap` this holds no file open: shards may be thousands."""
    size = file.stat().st_size
    try:
        content: npt.NDArray[np.uint8] = torch.from_file(str(file), False, size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(f"{file} cannot be mapped: {error}") from error
    content.flags.writeable = False
    return content
