"""One file of the store: a shard of entries, verified by its own name.

A safetensors file with the sorted keys, the end offset of each entry's values, a checksum per entry, and the
float32 values of all entries. Its name is a digest of the fingerprint and of everything except the values,
which the checksums cover: a shard copied from the folder of another fingerprint counts as damaged.
"""

import hashlib
import itertools
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

from dpo_dist.foundation.files import staged_file

log = logging.getLogger(__name__)

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float32]

_Number = TypeVar("_Number", np.uint64, np.int64, np.float32)

_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_SUFFIX = ".safetensors"
_MOST_TOKENS = 2**23
_MOST_VALUES = 2**38
"""Of an entry, and of a shard: more than any; forged ones would not fit into the index."""


@dataclass(frozen=True)
class Shard:
    """One shard, memory-mapped.

    Attributes:
        keys: uint64 [entries, 2].
        ends: int64 [entries], end offset of each entry in `values`.
        checks: int64 [entries], CRC-32 of each entry's values.
        values: float32 [tokens]; shorter if the file is truncated.
        bytes: size of the file.
    """

    keys: Keys
    ends: npt.NDArray[np.int64]
    checks: npt.NDArray[np.int64]
    values: Values
    bytes: int

    @property
    def tokens(self) -> int:
        """Number of values that a complete file has."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def is_truncated(self) -> bool:
        """True if values are missing at the end."""
        return len(self.values) < self.tokens


def list_shards(folder: Path) -> list[str]:
    """Return the names of all shards in the folder of a fingerprint, damaged ones included.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_file())


def list_foreign(folder: Path) -> list[str]:
    """Return files and folders that have a shard's suffix but are not shards."""
    with os.scandir(folder) as entries:
        alike = [entry for entry in entries if entry.name.endswith(_SUFFIX)]
        return sorted(e.name for e in alike if not (_NAME.fullmatch(e.name) and e.is_file()))


def shard_name(folder: str, keys: Keys, ends: npt.NDArray[np.int64], checks: npt.NDArray[np.int64]) -> str:
    """Return a shard's file name: a digest of its folder's name, its keys, ends and checksums."""
    digest = hashlib.blake2b(folder.encode(), digest_size=16)
    for array in (keys, ends, checks):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest() + _SUFFIX


def write_shard(folder: Path, keys: Keys, entries: Sequence[Values]) -> str:
    """Write entries to `folder` as one shard, whole or not at all; return its name.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    entries = [np.ascontiguousarray(entries[i], dtype=np.float32) for i in order]
    keys = np.ascontiguousarray(keys[order])
    ends = np.cumsum([len(entry) for entry in entries], dtype=np.int64)
    checks = np.array([zlib.crc32(entry.data) for entry in entries], dtype=np.int64)
    name = shard_name(folder.name, keys, ends, checks)
    with staged_file(folder / name) as temporary:
        # Wider numbers come first in the file, so that a truncated one has lost values and no keys.
        tensors = {"keys": keys, "ends": ends, "checks": checks, "values": np.concatenate(entries)}
        save_file(tensors, temporary)
    return name


def open_shard(file: Path) -> Shard | None:
    """Map a shard and verify it by its name and folder; None, with a warning, if it is damaged or missing.

    Raises:
        OSError: the file exists and cannot be mapped.
    """
    try:
        return verified_shard(file, _map(file))
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        log.warning("shard %s is damaged, its entries count as missing: %s", file, error)
    return None


def verified_shard(file: Path, content: npt.NDArray[np.uint8]) -> Shard:
    """Return the shard in `content`, the bytes of `file`.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: the content does not match the name and folder.
    """
    shard = parse_shard(content)
    if shard_name(file.parent.name, shard.keys, shard.ends, shard.checks) != file.name:
        raise ValueError("its keys do not match its name and folder")
    if shard.is_truncated:
        log.warning("shard %s is truncated; only its complete entries are used", file)
    return shard


def damaged_entries(shard: Shard) -> npt.NDArray[np.int64]:
    """Return the numbers of the entries whose values do not match their checksums."""
    bounds = np.concatenate(([0], shard.ends)).tolist()
    damaged = [
        number
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
        if not is_intact(shard.values[start:stop], stop - start, int(shard.checks[number]))
    ]
    return np.array(damaged, dtype=np.int64)


def is_intact(values: Values, tokens: int, check: int) -> bool:
    """Return True if an entry's values are complete and match their checksum."""
    return len(values) == tokens and zlib.crc32(values.data) == check


def parse_shard(content: npt.NDArray[np.uint8]) -> Shard:
    """Return views of the tensors in a safetensors file; only the offsets of its header are used.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: it is not a shard.
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
        raise ValueError("the numbers of keys, ends and checksums differ")
    tokens = np.diff(shard.ends, prepend=0)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= _MOST_TOKENS or shard.ends[-1] > _MOST_VALUES):
        raise ValueError("the ends of its entries are no ends")
    return shard


def _map(file: Path) -> npt.NDArray[np.uint8]:
    """Map the bytes of a file. Unlike `numpy.memmap` this keeps no file open: shards may be thousands."""
    import torch  # noqa: PLC0415  (store maintenance starts without it)

    size = file.stat().st_size
    try:
        content: npt.NDArray[np.uint8] = torch.from_file(str(file), False, size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(f"{file} cannot be mapped: {error}") from error
    content.flags.writeable = False
    return content
