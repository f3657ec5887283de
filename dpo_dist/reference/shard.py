"""One file of the store: a shard of rows, which its own name verifies.

A safetensors file of sorted keys, where each row's values end, a checksum per row, and the float32 values of
all rows. Its name is the digest of everything but the values, which the checksums cover.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

log = logging.getLogger(__name__)

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float32]

_Number = TypeVar("_Number", np.uint64, np.int64, np.uint32, np.float32)

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Shard:
    """One shard, mapped: keys uint64 [rows, 2], where values end, checksums, and the values."""

    name: str
    keys: Keys
    ends: npt.NDArray[np.int64]
    checks: npt.NDArray[np.uint32]
    values: Values


def shard_name(keys: Keys, ends: npt.NDArray[np.int64], checks: npt.NDArray[np.uint32]) -> str:
    """The name of a shard's file: a digest of its index."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (keys, ends, checks):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest() + SUFFIX


def open_shard(file: Path) -> Shard | None:
    """Map a shard and verify its index against its name; None, with a warning, if it does not hold.

    Raises:
        OSError: the file is there and cannot be mapped.
    """
    try:
        shard = _parse_shard(file.name, _map(file))
        if shard_name(shard.keys, shard.ends, shard.checks) == file.name:
            return shard
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log.warning("shard %s cannot be read: %s", file, error)
    log.warning("shard %s is damaged; its rows count as missing", file)
    return None


def _parse_shard(name: str, content: npt.NDArray[np.uint8]) -> Shard:
    """Find the tensors in a safetensors file; of its header only the places count, the types are ours."""
    header_bytes = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + header_bytes].tobytes())

    def tensor(name: str, dtype: type[_Number]) -> npt.NDArray[_Number]:
        start, stop = header[name]["data_offsets"]
        return content[8 + header_bytes :][start:stop].view(dtype)

    shard = Shard(
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
