"""One file of the store: a shard of rows, which its own name verifies.

A safetensors file of sorted keys, where each row's values end, a checksum per row, and the float32 values of
all rows. Its name is a digest of the space that it belongs to and of everything but the values, which the
checksums cover: a shard that was copied in from another space does not hold.
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from dpo_dist.atomic import staged_file

log = logging.getLogger(__name__)

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float32]

_Number = TypeVar("_Number", np.uint64, np.int64, np.float32)

_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Shard:
    """One shard, mapped.

    Attributes:
        keys: uint64 [rows, 2].
        ends: int64 [rows], where each row's values end.
        checks: int64 [rows], CRC-32 of each row's values.
        values: float32; fewer than `ends` says if the file was cut short.
        bytes: size of the file.
    """

    keys: Keys
    ends: npt.NDArray[np.int64]
    checks: npt.NDArray[np.int64]
    values: Values
    bytes: int

    @property
    def tokens(self) -> int:
        """How many values the index promises."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def is_cut_short(self) -> bool:
        """Whether values are missing at its end."""
        return len(self.values) < self.tokens


def list_shards(folder: Path) -> list[str]:
    """The names of all shards of a space, whatever is in them.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_file())


def list_foreign(folder: Path) -> list[str]:
    """What lies in a space under a shard's suffix and is none: other names, folders."""
    with os.scandir(folder) as entries:
        alike = [entry for entry in entries if entry.name.endswith(_SUFFIX)]
        return sorted(e.name for e in alike if not (_NAME.fullmatch(e.name) and e.is_file()))


def shard_name(space: str, keys: Keys, ends: npt.NDArray[np.int64], checks: npt.NDArray[np.int64]) -> str:
    """The name of a shard's file: a digest of its space's name and its index."""
    digest = hashlib.blake2b(space.encode(), digest_size=16)
    for array in (keys, ends, checks):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest() + _SUFFIX


def write_shard(folder: Path, keys: Keys, rows: Sequence[Values]) -> str:
    """Write rows of the space `folder` as one shard, whole or not at all, and give its name.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    rows = [np.ascontiguousarray(rows[i], dtype=np.float32) for i in order]
    keys = np.ascontiguousarray(keys[order])
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    checks = np.array([zlib.crc32(row.data) for row in rows], dtype=np.int64)
    name = shard_name(folder.name, keys, ends, checks)
    with staged_file(folder / name) as temporary:
        # Wider numbers come first in the file, so that one cut short has lost values and not its index.
        tensors = {"keys": keys, "ends": ends, "checks": checks, "values": np.concatenate(rows)}
        save_file(tensors, temporary)
    return name


def open_shard(file: Path) -> Shard | None:
    """Map a shard and verify its index by its name and folder; None, with a warning, if it does not hold.

    Raises:
        OSError: the file is there and cannot be mapped.
    """
    try:
        return verified_shard(file, _map(file))
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError) as error:
        log.warning("shard %s is damaged, its rows count as missing: %s", file, error)
    return None


def verified_shard(file: Path, content: npt.NDArray[np.uint8]) -> Shard:
    """The shard that is the `content` of `file`.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: it is not the shard that its name and folder say.
    """
    shard = parse_shard(content)
    if shard_name(file.parent.name, shard.keys, shard.ends, shard.checks) != file.name:
        raise ValueError("its index is not the one of its name and reference")
    if shard.is_cut_short:
        log.warning("shard %s is cut short; of its rows those before the cut are used", file)
    return shard


def damaged_rows(shard: Shard) -> npt.NDArray[np.int64]:
    """Which rows have values that their checksums do not hold for."""
    bounds = np.concatenate(([0], shard.ends)).tolist()
    return np.array(
        [
            row
            for row, check in enumerate(shard.checks.tolist())
            if not holds(shard.values[bounds[row] : bounds[row + 1]], bounds[row + 1] - bounds[row], check)
        ],
        dtype=np.int64,
    )


def holds(values: Values, tokens: int, check: int) -> bool:
    """Whether a row's values are complete and as they were written."""
    return len(values) == tokens and zlib.crc32(values.data) == check


def parse_shard(content: npt.NDArray[np.uint8]) -> Shard:
    """Find the tensors in a safetensors file; of its header only the places count, the types are ours.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: they are not there.
    """
    header_bytes = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + header_bytes].tobytes())

    def tensor(name: str, dtype: type[_Number]) -> npt.NDArray[_Number]:
        start, stop = header[name]["data_offsets"]
        found = content[8 + header_bytes :][start:stop]
        return found[: len(found) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize].view(dtype)

    shard = Shard(
        tensor("keys", np.uint64).reshape(-1, 2),
        tensor("ends", np.int64),
        tensor("checks", np.int64),
        tensor("values", np.float32),
        len(content),
    )
    if not len(shard.keys) == len(shard.ends) == len(shard.checks):
        raise ValueError("keys, ends and checksums are not of the same rows")
    return shard


def _map(file: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, mapped. Unlike `numpy.memmap` this holds no file open: shards may be thousands."""
    import torch  # noqa: PLC0415  (what only looks after a store starts without it)

    size = file.stat().st_size
    try:
        content: npt.NDArray[np.uint8] = torch.from_file(str(file), False, size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(f"{file} cannot be mapped: {error}") from error
    content.flags.writeable = False
    return content
