"""One file of the store: a shard of entries, verified by its own name.

A safetensors file with the sorted keys, the end offset of each entry's values, a checksum per entry, and the
float32 values of all entries. Its name is a digest of the fingerprint and of everything except the values,
which the checksums cover: a shard copied from the folder of another fingerprint counts as damaged.
"""

import hashlib
import logging
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dpo_dist.foundation.files import staged_file

log = logging.getLogger(__name__)

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float32]

_SUFFIX = ".safetensors"
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


@dataclass(frozen=True)
class Shard:
    """One verified shard, whose values are mapped when they are first asked for.

    Attributes:
        file: of the shard.
        keys: uint64 [entries, 2].
        ends: int64 [entries], end offset of each entry in `values`.
        checks: int64 [entries], CRC-32 of each entry's values.
    """

    file: Path
    keys: Keys
    ends: npt.NDArray[np.int64]
    checks: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Number of values."""
        return int(self.ends[-1])

    @cached_property
    def bytes(self) -> int:
        """Size of the file."""
        return self.file.stat().st_size

    @cached_property
    def values(self) -> Values:
        """float32 [tokens]: the last numbers of the file, as safetensors writes narrow numbers last."""
        import torch  # noqa: PLC0415  (statistics of a store need no values)

        # Unlike `numpy.memmap` this keeps no file open: shards may be thousands.
        content: npt.NDArray[np.uint8] = torch.from_file(
            str(self.file), False, self.bytes, dtype=torch.uint8
        ).numpy()
        content.flags.writeable = False
        return content[len(content) - 4 * self.tokens :].view(np.float32)

    def count_damaged(self) -> int:
        """Return the number of entries whose values do not match their checksums."""
        parts = np.split(self.values, self.ends[:-1])
        return sum(zlib.crc32(part.data) != check for part, check in zip(parts, self.checks, strict=True))


def list_shards(folder: Path) -> list[str]:
    """Return the names of all shards in the folder of a fingerprint, damaged ones included.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_file())


def list_foreign(folder: Path) -> list[str]:
    """Return files and folders that have a shard's suffix but are not shards."""
    return sorted({path.name for path in folder.glob(f"*{_SUFFIX}")} - set(list_shards(folder)))


def _name(folder: Path, keys: Keys, ends: npt.NDArray[np.int64], checks: npt.NDArray[np.int64]) -> str:
    digest = hashlib.blake2b(folder.name.encode(), digest_size=16)
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
    name = _name(folder, keys, ends, checks)
    with staged_file(folder / name) as temporary:
        tensors = {"keys": keys, "ends": ends, "checks": checks, "values": np.concatenate(entries)}
        save_file(tensors, temporary)
    return name


def open_shard(file: Path) -> Shard | None:
    """Read and verify a shard's keys by its name and folder; None, with a warning, if they are others.

    Raises:
        OSError: the file exists and cannot be read.
    """
    try:
        with safe_open(file, "np") as opened:
            keys, ends, checks = (opened.get_tensor(name) for name in ("keys", "ends", "checks"))
        shard = Shard(file, keys.view(np.uint64).reshape(-1, 2), ends.view(np.int64), checks.view(np.int64))
        if _name(file.parent, shard.keys, shard.ends, shard.checks) == file.name:
            return shard
        fault = "its keys do not match its name and folder"
    except (FileNotFoundError, SafetensorError, ValueError, TypeError) as error:
        fault = str(error)
    except OSError as error:
        raise OSError(f"{file}: {error}") from error
    log.warning("shard %s is damaged, its entries count as missing: %s", file, fault)
    return None
