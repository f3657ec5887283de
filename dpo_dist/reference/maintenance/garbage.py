"""Garbage collection of a store: unwanted references, and temporary files of dead writers."""

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dpo_dist.atomic import temporary_name
from dpo_dist.errors import ConfigError
from dpo_dist.reference.maintenance.info import FingerprintInfo, changed_at, take_inventory
from dpo_dist.reference.maintenance.verify import find_leftovers

# A shard is written in seconds. Whether its writer is alive cannot be checked: it may run on another node, or
# in a container with its own process numbers.
_LEFTOVER_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Garbage:
    """Folders and temporary files to delete from the store `root`."""

    root: Path
    fingerprints: list[FingerprintInfo]
    leftovers: list[Path]


def find_garbage(root: Path, drop: Sequence[str], keep: Sequence[str], unused_days: float | None) -> Garbage:
    """Select garbage without deleting it; without a selection only temporary files of dead writers.

    Args:
        root: `reference.store`.
        drop: digests of references or fingerprints to delete, or their first digits.
        keep: digests of those to keep; without `unused_days` all others are deleted.
        unused_days: delete those that no run has opened for so long.

    Raises:
        ConfigError: a digest matches no reference, or more than one.
        ReferenceModelError: the store does not exist.
    """
    found = take_inventory(root)
    dropped = {name for digits in drop for name in _matching(found, "--drop", digits)}
    kept = {name for digits in keep for name in _matching(found, "--keep", digits)}
    if dropped & kept:
        raise ConfigError(
            "a reference is given to both --drop and --keep",
            where="--drop, --keep",
            got=", ".join(sorted(dropped & kept)),
            remedy="name it in one of them",
        )
    unwanted = [info for info in found if _is_unwanted(info, dropped, kept, unused_days)]
    now = time.time()
    leftovers = [path for path in find_leftovers(root) if now - changed_at(path, now) > _LEFTOVER_SECONDS]
    return Garbage(root, unwanted, leftovers)


def remove(garbage: Garbage) -> None:
    """Delete it. A folder is renamed first, so that no run finds it incomplete.

    Raises:
        OSError: a file cannot be deleted.
    """
    for info in garbage.fingerprints:
        folder = garbage.root / info.name
        aside = temporary_name(folder)
        with contextlib.suppress(FileNotFoundError):  # another gc was first
            folder.rename(aside)
            _remove_folder(aside)
    for path in garbage.leftovers:
        if path.is_dir():
            _remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    """Delete a folder, even if another gc deletes parts of it meanwhile."""
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _is_unwanted(info: FingerprintInfo, dropped: set[str], kept: set[str], unused_days: float | None) -> bool:
    if info.name in dropped:
        return True
    if info.name in kept:
        return False
    if unused_days is not None:
        return datetime.now(UTC) - info.last_used > timedelta(days=unused_days)
    return bool(kept)


def _matching(infos: list[FingerprintInfo], option: str, digits: str) -> list[str]:
    """Return the names of the fingerprints that `digits` match: all of one reference, or a single one."""
    by_reference = [
        i for i in infos if i.fingerprint is not None and i.fingerprint.reference.startswith(digits)
    ]
    found = by_reference or [info for info in infos if info.name.startswith(digits)]
    meant = {i.fingerprint.reference if by_reference and i.fingerprint else i.name for i in found}
    if len(meant) != 1 or not digits:
        raise ConfigError(
            "a digest matches no reference" if not meant else "a digest matches more than one reference",
            where=option,
            got=digits,
            expected="the digest of a reference or a fingerprint, or enough of its first digits",
            remedy="python -m dpo_dist.store info lists them",
        )
    return [info.name for info in found]
