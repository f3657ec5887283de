"""What is in a store: its references, how much each holds, when it was last used. Needs no torch."""

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

_SPACE_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class FingerprintInfo:
    """What one space holds.

    Attributes:
        name: of its folder.
        space: what it is; None if it does not say, or was written by another version.
        is_outdated: whether it was written by another version: its rows serve nobody.
        damaged: shards whose index does not hold; not counted in `shards`.
        tokens: values, one for each completion token of each row.
        bytes: of all its files.
        last_used: when a run last opened it.
    """

    name: str
    space: ReferenceFingerprint | None
    is_outdated: bool
    shards: int
    damaged: int
    rows: int
    tokens: int
    bytes: int
    last_used: datetime

    @property
    def label(self) -> str:
        """The model's name, or why there is none."""
        if self.space is not None:
            return self.space.label or "unnamed"
        return "of another version" if self.is_outdated else f"no valid {FINGERPRINT_FILE}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "space": self.name,
            "reference": self.space.reference if self.space else None,
            "label": self.label,
            "profile": self.space.profile if self.space else None,
            "rows": self.rows,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shards": self.shards,
            "damaged_shards": self.damaged,
            "last_used": self.last_used.isoformat(timespec="seconds"),
        }


def fingerprint_folders(root: Path) -> list[Path]:
    """The folders of all spaces of a store.

    Raises:
        ReferenceModelError: there is no such store.
    """
    try:
        return sorted(path for path in root.iterdir() if _SPACE_NAME.fullmatch(path.name) and path.is_dir())
    except OSError as error:
        raise ReferenceModelError(
            "there is no such reference store",
            where=str(root),
            got=str(error.strerror),
            remedy="name the folder that reference.store names, by default output/reference",
        ) from error


def is_outdated(folder: Path) -> bool:
    """Whether a space was written by another version of the program."""
    try:
        content = json.loads((folder / FINGERPRINT_FILE).read_bytes())
        return bool(content["logp_path"] != LOGP_PATH_VERSION or content.get("format", 1) != STORE_FORMAT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def take_inventory(root: Path) -> list[FingerprintInfo]:
    """All spaces of a store, the last used first. Reads indices, not values.

    Spaces and files that another process removes meanwhile are left out.

    Raises:
        ReferenceModelError: there is no such store.
        OSError: a space cannot be read.
    """
    spaces = []
    for folder in fingerprint_folders(root):
        with contextlib.suppress(FileNotFoundError):
            spaces.append(fingerprint_info(folder))
    return sorted(spaces, key=lambda space: space.last_used, reverse=True)


def fingerprint_info(folder: Path) -> FingerprintInfo:
    """What the space `folder` holds.

    Raises:
        OSError: it cannot be read; FileNotFoundError if it is there no more.
    """
    outdated = is_outdated(folder)
    files = [] if outdated else [folder / name for name in list_shards(folder)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        sizes = [size for size in pool.map(_rows_and_tokens, files) if size is not None]
    made = folder.stat().st_mtime
    return FingerprintInfo(
        name=folder.name,
        space=read_fingerprint(folder),
        is_outdated=outdated,
        shards=len(sizes),
        damaged=len(files) - len(sizes),
        rows=sum(rows for rows, _ in sizes),
        tokens=sum(tokens for _, tokens in sizes),
        bytes=sum(map(_size, folder.rglob("*"))),
        last_used=datetime.fromtimestamp(changed_at(folder / FINGERPRINT_FILE, made), UTC),
    )


def changed_at(path: Path, gone: float) -> float:
    """When `path` was last changed, in seconds since 1970; `gone` if it is there no more."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return gone


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _rows_and_tokens(file: Path) -> tuple[int, int] | None:
    """Of a shard, by its index alone; None if that does not hold."""
    try:
        shard = verified_shard(file, np.memmap(file, dtype=np.uint8, mode="r"))
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return len(shard.keys), len(shard.values)
