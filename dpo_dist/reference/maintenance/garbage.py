"""What of a store may go: references that nobody wants, and what dead writers left. Needs no torch."""

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

# A shard is written in seconds. Whether its writer lives cannot be asked: it may run on another node, or in a
# container with process numbers of its own.
_LEFTOVER_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Garbage:
    """What is to go from the store `root`."""

    root: Path
    spaces: list[FingerprintInfo]
    leftovers: list[Path]


def find_garbage(root: Path, drop: Sequence[str], keep: Sequence[str], unused_days: float | None) -> Garbage:
    """Choose what is to go; nothing is removed yet. Without a choice only leftovers go.

    Args:
        root: `reference.store`.
        drop: digests of references or spaces that go, or the first digits of them.
        keep: the same of those that stay; without `unused_days` all others go.
        unused_days: those go that no run has opened for so long.

    Raises:
        ConfigError: a digest fits nothing, or more than one reference.
        ReferenceModelError: there is no such store.
    """
    spaces = take_inventory(root)
    dropped = {name for digits in drop for name in _named(spaces, "--drop", digits)}
    kept = {name for digits in keep for name in _named(spaces, "--keep", digits)}
    if dropped & kept:
        raise ConfigError(
            "a reference cannot be dropped and kept",
            where="--drop, --keep",
            got=", ".join(sorted(dropped & kept)),
        )
    going = [space for space in spaces if _goes(space, dropped, kept, unused_days)]
    now = time.time()
    leftovers = [path for path in find_leftovers(root) if now - changed_at(path, now) > _LEFTOVER_SECONDS]
    return Garbage(root, going, leftovers)


def remove(garbage: Garbage) -> None:
    """Remove it. A space disappears as a whole first, so that no run finds a half of it.

    Raises:
        OSError: something cannot be removed.
    """
    for space in garbage.spaces:
        folder = garbage.root / space.name
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
    """Remove a folder, whatever of it another gc removes meanwhile."""
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _goes(space: FingerprintInfo, dropped: set[str], kept: set[str], unused_days: float | None) -> bool:
    if space.name in dropped:
        return True
    if space.name in kept:
        return False
    if unused_days is not None:
        return datetime.now(UTC) - space.last_used > timedelta(days=unused_days)
    return bool(kept)


def _named(spaces: list[FingerprintInfo], option: str, digits: str) -> list[str]:
    """The names of the spaces that `digits` mean: all of one reference, or a single one."""
    by_reference = [s for s in spaces if s.space is not None and s.space.reference.startswith(digits)]
    found = by_reference or [space for space in spaces if space.name.startswith(digits)]
    meant = {s.space.reference if by_reference and s.space else s.name for s in found}
    if len(meant) != 1 or not digits:
        raise ConfigError(
            "a digest fits no reference" if not meant else "a digest fits more than one reference",
            where=option,
            got=digits,
            expected="the digest of a reference or a space, or enough of its first digits",
            remedy="python -m dpo_dist.store info lists them",
        )
    return [space.name for space in found]
