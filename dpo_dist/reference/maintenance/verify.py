"""Check every row of a store, and repair what is damaged. Needs no torch."""

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
    damaged_rows,
    list_shards,
    parse_shard,
    shard_name,
    verified_shard,
    write_shard,
)

_SHARDS_AT_ONCE = 4  # of a process: some ten milliseconds


@dataclass(frozen=True)
class Damage:
    """A file that does not hold what its name promises."""

    file: Path
    fault: str


@dataclass(frozen=True)
class Verification:
    """What was found in a store.

    Attributes:
        shards, rows: that were read.
        duplicates: rows that another row of the same space makes needless.
        damage: files that do not hold; their rows are computed again by the runs that need them.
        foreign: files that are no part of a store; they are passed over.
        leftovers: of writers that are writing now, or died.
        outdated: spaces of another version of the program, which serve nobody and were not read.
    """

    shards: int
    rows: int
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
    """Read every shard of the store `root` and check its name and the checksum of every row, in parallel.

    Raises:
        ReferenceModelError: there is no such store.
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
        rows=sum(len(shard.keys) for shard in checked),
        duplicates=sum(_duplicates([s.keys for s in checked if s.file.parent == f]) for f in current),
        damage=[Damage(shard.file, shard.fault) for shard in checked if shard.fault]
        + [
            Damage(file, "missing or damaged; the next run that uses the space mends it")
            for file in undescribed
        ],
        foreign=list(_foreign(root, folders)),
        leftovers=find_leftovers(root),
        outdated=outdated,
    )


def repair(damage: Damage) -> tuple[bool, str]:
    """Mend one damaged file; whether that was possible, and what was done.

    The rows of a shard that hold are written to a new one before it is removed. A shard of another space of
    this store goes there.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    file = damage.file
    if file.name == FINGERPRINT_FILE:
        return False, "left to the next run that uses the space"
    home = _home(file)
    if home is not None:
        file.replace(home / file.name)
        return True, f"moved to {home.name}"
    try:
        shard = verified_shard(file, _read(file))
    except FileNotFoundError:
        return True, "removed by another process"
    except (ValueError, KeyError, TypeError, OverflowError):
        file.unlink()
        return True, "removed; none of its rows can be told to be right"
    whole = np.setdiff1d(np.arange(len(shard.keys)), damaged_rows(shard))
    starts = np.concatenate(([0], shard.ends))
    if len(whole):
        rows = [shard.values[starts[row] : starts[row + 1]] for row in whole]
        write_shard(file.parent, shard.keys[whole], rows)
    file.unlink()
    return True, f"written anew with {len(whole)} of {len(shard.keys)} rows"


def find_leftovers(root: Path) -> list[Path]:
    """Temporary files and folders of a store, of writers that are writing now or died."""
    folders = [root, *(path for path in sorted(root.iterdir()) if path.is_dir() and not is_temporary(path))]
    return [path for folder in folders for path in _entries(folder) if is_temporary(path)]


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing if another process has removed it."""
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
    except FileNotFoundError:  # removed since it was listed
        return _CheckedShard(file, np.empty((0, 2), dtype=np.uint64), "")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        home = _home(file)
        fault = f"a shard of {home.name}" if home is not None else f"no row can be told to be right: {error}"
        return _CheckedShard(file, np.empty((0, 2), dtype=np.uint64), fault)
    damaged = damaged_rows(shard)
    fault = f"{len(damaged)} of {len(shard.keys)} rows do not hold" if len(damaged) else ""
    return _CheckedShard(file, np.delete(shard.keys, damaged, axis=0), fault)


def _home(file: Path) -> Path | None:
    """The space of this store that a shard was written for, if that is another one."""
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
