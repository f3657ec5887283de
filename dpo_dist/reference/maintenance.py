"""Maintenance of a store: statistics, verification, garbage collection."""

import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import ConfigError, ReferenceModelError
from dpo_dist.foundation.files import is_temporary, temporary_name
from dpo_dist.reference.fingerprint import (
    FINGERPRINT_FILE,
    MEMO_FOLDER,
    ReferenceFingerprint,
    read_fingerprint,
)
from dpo_dist.reference.shard import list_shards, open_shard

_FOLDER_NAME = re.compile(r"[0-9a-f]{32}")
# A shard is written in seconds. Whether its writer is alive cannot be checked: it may run on another node.
_LEFTOVER_SECONDS = 24 * 3600


@dataclass(frozen=True)
class FingerprintInfo:
    """Statistics of one fingerprint's folder.

    Attributes:
        name: of the folder.
        fingerprint: None if `space.json` is missing or damaged, or another version wrote it.
        shards: number of shards that are not damaged.
        damaged: number of shards that fail verification.
        tokens: number of values, one for each completion token of each entry.
        bytes: size of all files.
        last_used: when a run last opened it.
    """

    name: str
    fingerprint: ReferenceFingerprint | None
    shards: int
    damaged: int
    entries: int
    tokens: int
    bytes: int
    last_used: datetime

    @property
    def label(self) -> str:
        """The model's name, or the reason why it is unknown."""
        if self.fingerprint is None:
            return f"no {FINGERPRINT_FILE} of this version"
        return self.fingerprint.label or "unnamed"

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
        ReferenceModelError: the store does not exist or cannot be read, or the folder has other files only.
    """
    try:
        content = sorted(root.iterdir())
    except OSError as error:
        raise _no_store(root, str(error.strerror)) from error
    named = [path for path in content if _FOLDER_NAME.fullmatch(path.name) and path.is_dir()]
    # Encoded data have such names too.
    found = [path for path in named if (path / FINGERPRINT_FILE).exists() or list_shards(path)]
    others = [path for path in content if path.name != MEMO_FOLDER and not is_temporary(path)]
    if others and not found:
        raise _no_store(root, f"{others[0].name} and no log-probs")
    return found


def _no_store(root: Path, got: str) -> ReferenceModelError:
    return ReferenceModelError(
        "no reference store is found in this folder",
        where=str(root),
        got=got,
        remedy="give the folder set as reference.store, by default output/reference",
    )


def take_inventory(root: Path) -> list[FingerprintInfo]:
    """Return all fingerprints of a store, the last used first. Reads keys, not values.

    Raises:
        ReferenceModelError: the store does not exist.
        OSError: a folder cannot be read.
    """
    return sorted(map(_info, fingerprint_folders(root)), key=lambda info: info.last_used, reverse=True)


def _info(folder: Path) -> FingerprintInfo:
    files = [folder / name for name in list_shards(folder)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        shards = [shard for shard in pool.map(open_shard, files) if shard is not None]
    described = folder / FINGERPRINT_FILE
    used = (described if described.exists() else folder).stat().st_mtime
    return FingerprintInfo(
        name=folder.name,
        fingerprint=read_fingerprint(folder),
        shards=len(shards),
        damaged=len(files) - len(shards),
        entries=sum(len(shard.keys) for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
        last_used=datetime.fromtimestamp(used, UTC),
    )


def verify_store(root: Path) -> tuple[int, int, dict[Path, str]]:
    """Read every entry of a store; return its shards, intact entries, and the fault of each damaged file.

    Raises:
        ReferenceModelError: the store does not exist.
    """
    folders = fingerprint_folders(root)
    files = [folder / name for folder in folders for name in list_shards(folder)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        checked = list(pool.map(_check, files))
    damage = {file: fault for file, (_, fault) in zip(files, checked, strict=True) if fault}
    for folder in folders:
        if read_fingerprint(folder) is None:
            damage[folder / FINGERPRINT_FILE] = "missing, damaged or of another version"
    return len(files), sum(intact for intact, _ in checked), damage


def _check(file: Path) -> tuple[int, str]:
    """Return the number of intact entries of a shard, and its fault."""
    shard = open_shard(file)
    if shard is None:
        return 0, "no entry can be verified"
    damaged = shard.count_damaged()
    fault = f"{damaged} of {len(shard.keys)} entries are damaged" if damaged else ""
    return len(shard.keys) - damaged, fault


def find_garbage(
    root: Path, drop: Sequence[str], unused_days: float | None
) -> tuple[list[FingerprintInfo], list[Path]]:
    """Return fingerprints to delete from a store, and temporary files of dead writers.

    Fingerprints are those of the references or fingerprints with the first digits `drop`, and those that no
    run has opened for `unused_days`.

    Raises:
        ConfigError: digits match no reference, or more than one.
        ReferenceModelError: the store does not exist.
    """
    found, unwanted = take_inventory(root), []
    for digits in drop:
        matching = [info for info in found if _has_digits(info, digits)]
        references = {info.fingerprint.reference if info.fingerprint else info.name for info in matching}
        if len(references) != 1:
            raise ConfigError(
                "a digest matches more than one reference" if matching else "a digest matches no reference",
                where="--drop",
                got=digits,
                remedy="python -m dpo_dist.store info lists the digests",
            )
        unwanted += matching
    if unused_days is not None:
        oldest = datetime.now(UTC) - timedelta(days=unused_days)
        unwanted += [info for info in found if info.last_used < oldest]
    places = [root, *(root / info.name for info in found)]
    temporary = (path for place in places for path in sorted(place.iterdir()) if is_temporary(path))
    leftovers = [path for path in temporary if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS]
    return [info for info in found if info in unwanted], leftovers


def _has_digits(info: FingerprintInfo, digits: str) -> bool:
    reference = info.fingerprint.reference if info.fingerprint else ""
    return info.name.startswith(digits) or reference.startswith(digits)


def remove(paths: Sequence[Path]) -> None:
    """Delete files and folders. A folder is renamed first, so that no run finds it incomplete.

    Raises:
        OSError: one cannot be deleted.
    """
    for path in paths:
        if path.is_dir():
            aside = path.rename(temporary_name(path))
            shutil.rmtree(aside, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
