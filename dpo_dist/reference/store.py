"""Reference log-probs on disk: append-only shards of rows, found by content key, checked when read.

A shard is one safetensors file: sorted keys, where each row's values end, a checksum per row, and the float32
values of all rows. Its name is the digest of everything but the values, which the checksums cover; so a shard
is verified from its own name, writers never meet, and several jobs fill one store at once. Opening reads keys
only.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dpo_dist.atomic import is_temporary, staged_file, write_text
from dpo_dist.errors import ReferenceError
from dpo_dist.reference.key import ReferenceSpace

log = logging.getLogger(__name__)

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float32]

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Shard:
    """One open shard; `values` stay on disk."""

    name: str
    keys: Keys
    ends: npt.NDArray[np.int64]
    checks: npt.NDArray[np.uint32]
    values: Values

    def row(self, place: int) -> Values | None:
        """The values of the row at `place`; None if their checksum does not hold."""
        start = int(self.ends[place - 1]) if place else 0
        row = self.values[start : int(self.ends[place])]
        return row if _check(row) == self.checks[place] else None


class LogpStore:
    """Rows of one reference space: response key to per-token float32 log-probs.

    A row holds one value per completion token, end-of-turn token included. Keys are uint64 [n, 2]
    (`data.dataset.response_key`).
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = folder
        self.damaged: list[str] = []
        self._shards: list[_Shard] = []
        for name in sorted(names):
            shard = _open_shard(folder / name)
            if shard is None:
                self.damaged.append(name)
            else:
                self._shards.append(shard)
        self._build_index()

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

    @property
    def names(self) -> list[str]:
        """The shards this view of the store was opened with, damaged ones left out."""
        return [shard.name for shard in self._shards]

    def __len__(self) -> int:
        return len(self._places)

    def _build_index(self) -> None:
        """Sort all keys by their first word: 16 bytes a row, shards stay mapped."""
        words = [shard.keys[:, 0] for shard in self._shards]
        shard_numbers = [np.full(len(w), number, dtype=np.uint64) for number, w in enumerate(words)]
        rows = [np.arange(len(w), dtype=np.uint64) for w in words]
        empty = np.empty(0, dtype=np.uint64)
        all_words = np.concatenate([empty, *words])
        places = (np.concatenate([empty, *shard_numbers]) << np.uint64(32)) | np.concatenate([empty, *rows])
        order = np.argsort(all_words, kind="stable")
        self._words, self._places = all_words[order], places[order]

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of `keys` have a row whose checksum holds; bool [n]."""
        return np.array([self._find(key) is not None for key in self._with_starts(keys)], dtype=np.bool_)

    def read(self, keys: Keys) -> list[Values]:
        """The rows of `keys`, float32 [completion tokens] each.

        Raises:
            ReferenceError: a row is missing or damaged.
        """
        rows = []
        for key in self._with_starts(keys):
            row = self._find(key)
            if row is None:
                raise ReferenceError(
                    "a reference log-prob that this run needs is missing or damaged",
                    where=str(self.folder),
                    got=f"row {key[0]:016x}{key[1]:016x}",
                    remedy="start the same command again: what is missing is computed before training",
                )
            rows.append(row)
        return rows

    def _with_starts(self, keys: Keys) -> Iterable[tuple[int, int, int]]:
        starts = np.searchsorted(self._words, keys[:, 0])
        return zip(keys[:, 0].tolist(), keys[:, 1].tolist(), starts.tolist(), strict=True)

    def _find(self, key: tuple[int, int, int]) -> Values | None:
        first, second, place = key
        while place < len(self._words) and self._words[place] == first:
            packed = int(self._places[place])
            shard, row = self._shards[packed >> 32], packed & 0xFFFFFFFF
            if shard.keys[row, 1] == second and (values := shard.row(row)) is not None:
                return values
            place += 1
        return None

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
        checks = np.array([_check(row) for row in rows], dtype=np.uint32)
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


def _check(row: Values) -> int:
    return zlib.crc32(row.tobytes())


def _index_digest(keys: Keys, ends: npt.NDArray[np.int64], checks: npt.NDArray[np.uint32]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in (keys, ends, checks):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _open_shard(file: Path) -> _Shard | None:
    """Map a shard and verify its index against its name; None, with a warning, if it does not hold."""
    try:
        shard = _Shard(file.name, **_map_safetensors(file))
        if _index_digest(shard.keys, shard.ends, shard.checks) + _SUFFIX == file.name:
            return shard
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("shard %s cannot be read: %s", file, error)
    log.warning("shard %s is damaged; its rows count as missing", file)
    return None


_TENSORS = {"keys": np.uint64, "ends": np.int64, "checks": np.uint32, "values": np.float32}


def _map_safetensors(file: Path) -> dict[str, npt.NDArray[Any]]:
    """Map a shard's tensors without reading them; the layout is the format's own, their types are ours."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > size:
            raise ValueError("truncated header")
        header = json.loads(stream.read(header_bytes))
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in _TENSORS.items():
        entry = header[name]
        start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
        if stop > size:
            raise ValueError("truncated values")
        arrays[name] = np.memmap(file, dtype=dtype, mode="r", offset=start, shape=tuple(entry["shape"]))
    return arrays
