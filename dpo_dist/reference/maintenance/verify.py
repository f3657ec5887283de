"""Verify every entry of a store, and repair damaged shards."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_dist.atomic import is_temporary
from dpo_dist.reference.fingerprint import FINGERPRINT_FILE, MEMO_FOLDER, read_fingerprint
from dpo_dist.reference.maintenance.info import fingerprint_folders, is_outdated
from dpo_dist.reference.shard import (
    Keys,
    damaged_entries,
    list_shards,
    parse_shard,
    shard_name,
    verified_shard,
    write_shard,
)

_SHARDS_AT_ONCE = 4  # per task of a worker process: about ten milliseconds


@dataclass(frozen=True)
class Damage:
    """A damaged file."""

    file: Path
    fault: str


@dataclass(frozen=True)
class Verification:
    """Result of verifying a store.

    Attributes:
        shards: number of shards read.
        entries: number of intact entries.
        duplicates: entries whose key another entry of the same fingerprint has too.
        damage: damaged files; runs that need their entries compute them again.
        foreign: files that are not part of the store; they are ignored.
        leftovers: temporary files of running or dead writers.
        outdated: folders from another version of the program; not read, and used by no run.
    """

    shards: int
    entries: int
    duplicates: int
    damage: list[Damage]
    foreign: list[Path]
    leftovers: list[Path]
    outdated: list[Path]


@dataclass(frozen=True)
class _CheckedShard:
    file: Path
    keys: Keys
    fault: str


def verify_store(root: Path) -> Verification:
    """Read every shard of the store `root` and check its name and all checksums, in parallel.

    Raises:
        ReferenceModelError: the store does not exist.
        OSError: a file cannot be read.
    """
    folders = fingerprint_folders(root)
    outdated = [folder for folder in folders if is_outdated(folder)]
    current = [folder for folder in folders if folder not in outdated]
    files = [folder / name for folder in current for name in _shards(folder)]
    with ProcessPoolExecutor() as pool:
        checked = list(pool.map(_check, files, chunksize=_SHARDS_AT_ONCE))
    undescribed = [
        folder / FINGERPRINT_FILE
        for folder in current
        if read_fingerprint(folder) is None and folder.exists()
    ]
    return Verification(
        shards=len(checked),
        entries=sum(len(shard.keys) for shard in checked),
        duplicates=sum(_duplicates([s.keys for s in checked if s.file.parent == f]) for f in current),
        damage=[Damage(shard.file, shard.fault) for shard in checked if shard.fault]
        + [
            Damage(file, "missing or damaged; the next run that uses it writes it again")
            for file in undescribed
        ],
        foreign=list(_foreign(root, folders)),
        leftovers=find_leftovers(root),
        outdated=outdated,
    )


def repair(damage: Damage) -> tuple[bool, str]:
    """Repair one damaged file; return whether that was possible, and a description.

    The intact entries of a shard are written to a new one before it is deleted. A shard of another
    fingerprint in this store is moved to that folder.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    file = damage.file
    if file.name == FINGERPRINT_FILE:
        return False, "the next run that uses it writes it again"
    home = _home(file)
    if home is not None:
        file.replace(home / file.name)
        return True, f"moved to {home.name}"
    try:
        shard = verified_shard(file, _read(file))
    except FileNotFoundError:
        return True, "deleted by another process"
    except (ValueError, KeyError, TypeError, OverflowError):
        file.unlink()
        return True, "deleted; none of its entries can be verified"
    whole = np.setdiff1d(np.arange(len(shard.keys)), damaged_entries(shard))
    starts = np.concatenate(([0], shard.ends))
    if len(whole):
        entries = [shard.values[starts[number] : starts[number + 1]] for number in whole]
        write_shard(file.parent, shard.keys[whole], entries)
    file.unlink()
    return True, f"rewritten with {len(whole)} of {len(shard.keys)} entries"


def find_leftovers(root: Path) -> list[Path]:
    """Return temporary files and folders of a store, from running and from dead writers."""
    folders = [root, *(path for path in sorted(root.iterdir()) if path.is_dir() and not is_temporary(path))]
    return [path for folder in folders for path in _entries(folder) if is_temporary(path)]


def _entries(folder: Path) -> list[Path]:
    """Return the content of a folder, sorted; empty if another process has deleted it."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _shards(folder: Path) -> list[str]:
    try:
        return list_shards(folder)
    except FileNotFoundError:
        return []


def _check(file: Path) -> _CheckedShard:
    try:
        shard = verified_shard(file, _read(file))
    except FileNotFoundError:  # deleted since it was listed
        return _CheckedShard(file, np.empty((0, 2), dtype=np.uint64), "")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        home = _home(file)
        fault = f"it belongs to {home.name}" if home is not None else f"no entry can be verified: {error}"
        return _CheckedShard(file, np.empty((0, 2), dtype=np.uint64), fault)
    damaged = damaged_entries(shard)
    fault = f"{len(damaged)} of {len(shard.keys)} entries are damaged" if len(damaged) else ""
    return _CheckedShard(file, np.delete(shard.keys, damaged, axis=0), fault)


def _home(file: Path) -> Path | None:
    """Return the folder that a shard was written for, if that is another folder of this store."""
    try:
        shard = parse_shard(_read(file))
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
        return None
    for folder in fingerprint_folders(file.parents[1]):
        if (
            folder != file.parent
            and shard_name(folder.name, shard.keys, shard.ends, shard.checks) == file.name
        ):
            return folder
    return None


def _read(file: Path) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.fromfile(file, dtype=np.uint8)


def _duplicates(keys: list[Keys]) -> int:
    joined = np.concatenate([np.empty((0, 2), dtype=np.uint64), *keys])
    joined = joined[np.lexsort((joined[:, 1], joined[:, 0]))]
    return int((joined[1:] == joined[:-1]).all(axis=1).sum())


def _foreign(root: Path, folders: list[Path]) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path not in folders and path.name != MEMO_FOLDER and not is_temporary(path):
            yield path
    for folder in folders:
        known = {FINGERPRINT_FILE, *_shards(folder)}
        yield from (p for p in _entries(folder) if p.name not in known and not is_temporary(p))
