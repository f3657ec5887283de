"""Maintenance of a store: statistics, verification and repair, garbage collection. Imports no torch."""

import contextlib
import json
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.foundation.errors import ConfigError, ReferenceModelError
from dpo_dist.foundation.files import is_temporary, temporary_name
from dpo_dist.reference.fingerprint import (
    FINGERPRINT_FILE,
    LOGP_PATH_VERSION,
    MEMO_FOLDER,
    STORE_FORMAT,
    ReferenceFingerprint,
    read_fingerprint,
)
from dpo_dist.reference.shard import (
    Keys,
    damaged_entries,
    list_shards,
    parse_shard,
    shard_name,
    verified_shard,
    write_shard,
)

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
        ReferenceModelError: the store does not exist or cannot be read, or the folder has other files only.
    """
    try:
        content = sorted(root.iterdir())
    except OSError as error:
        raise _no_store(root, str(error.strerror)) from error
    found = [path for path in content if _FOLDER_NAME.fullmatch(path.name) and _is_of_store(path)]
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


def _is_of_store(folder: Path) -> bool:
    """Return whether a folder with the name of a fingerprint is one: encoded data have such names too."""
    try:
        names = {path.name for path in folder.iterdir()}
        return not names or FINGERPRINT_FILE in names or bool(list_shards(folder))
    except (NotADirectoryError, FileNotFoundError):  # a file, or another process has deleted it
        return False


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
