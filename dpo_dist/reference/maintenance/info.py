"""Statistics of a store: its fingerprints, their sizes and times of last use."""

import contextlib
import json
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.errors import ReferenceModelError
from dpo_dist.reference.fingerprint import (
    FINGERPRINT_FILE,
    LOGP_PATH_VERSION,
    STORE_FORMAT,
    ReferenceFingerprint,
    read_fingerprint,
)
from dpo_dist.reference.shard import list_shards, verified_shard

_FOLDER_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class FingerprintInfo:
    """Statistics of one fingerprint's folder.

    Attributes:
        name: of the folder.
        fingerprint: None if `space.json` is missing or damaged, or another version wrote it.
        is_outdated: whether another version wrote it; no run uses its entries.
        shards: number of shards that are not damaged.
        damaged: number of shards that fail verification.
        tokens: number of values, one for each completion token of each entry.
        bytes: size of all files.
        last_used: when a run last opened it.
    """

    name: str
    fingerprint: ReferenceFingerprint | None
    is_outdated: bool
    shards: int
    damaged: int
    entries: int
    tokens: int
    bytes: int
    last_used: datetime

    @property
    def label(self) -> str:
        """The model's name, or the reason why it is unknown."""
        if self.fingerprint is not None:
            return self.fingerprint.label or "unnamed"
        return "from another version" if self.is_outdated else f"no valid {FINGERPRINT_FILE}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of `info --json`."""
        return {
            "space": self.name,
            "reference": self.fingerprint.reference if self.fingerprint else None,
            "label": self.label,
            "profile": self.fingerprint.profile if self.fingerprint else None,
            "rows": self.entries,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shards": self.shards,
            "damaged_shards": self.damaged,
            "last_used": self.last_used.isoformat(timespec="seconds"),
        }


def fingerprint_folders(root: Path) -> list[Path]:
    """Return the folders of all fingerprints in a store.

    Raises:
        ReferenceModelError: the store does not exist or cannot be read.
    """
    try:
        return sorted(path for path in root.iterdir() if _FOLDER_NAME.fullmatch(path.name) and path.is_dir())
    except OSError as error:
        raise ReferenceModelError(
            "no reference store is found in this folder",
            where=str(root),
            got=str(error.strerror),
            remedy="give the folder set as reference.store, by default output/reference",
        ) from error


def is_outdated(folder: Path) -> bool:
    """Return whether another version of the program wrote this folder."""
    try:
        content = json.loads((folder / FINGERPRINT_FILE).read_bytes())
        return bool(content["logp_path"] != LOGP_PATH_VERSION or content.get("format", 1) != STORE_FORMAT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def take_inventory(root: Path) -> list[FingerprintInfo]:
    """Return all fingerprints of a store, the last used first. Reads keys, not values.

    Folders and files that another process deletes meanwhile are skipped.

    Raises:
        ReferenceModelError: the store does not exist.
        OSError: a folder cannot be read.
    """
    found = []
    for folder in fingerprint_folders(root):
        with contextlib.suppress(FileNotFoundError):
            found.append(_info(folder))
    return sorted(found, key=lambda info: info.last_used, reverse=True)


def _info(folder: Path) -> FingerprintInfo:
    outdated = is_outdated(folder)
    files = [] if outdated else [folder / name for name in list_shards(folder)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        sizes = [size for size in pool.map(_entries_and_tokens, files) if size is not None]
    created = folder.stat().st_mtime
    return FingerprintInfo(
        name=folder.name,
        fingerprint=read_fingerprint(folder),
        is_outdated=outdated,
        shards=len(sizes),
        damaged=len(files) - len(sizes),
        entries=sum(entries for entries, _ in sizes),
        tokens=sum(tokens for _, tokens in sizes),
        bytes=sum(map(_size, folder.rglob("*"))),
        last_used=datetime.fromtimestamp(changed_at(folder / FINGERPRINT_FILE, created), UTC),
    )


def changed_at(path: Path, if_missing: float) -> float:
    """Return the modification time of `path` in seconds since 1970; `if_missing` if it does not exist."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return if_missing


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _entries_and_tokens(file: Path) -> tuple[int, int] | None:
    """Return the sizes of a shard without reading its values; None if it is damaged."""
    try:
        shard = verified_shard(file, np.memmap(file, dtype=np.uint8, mode="r"))
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return len(shard.keys), len(shard.values)
