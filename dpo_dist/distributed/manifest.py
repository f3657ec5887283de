"""Manifest of a checkpoint: its files with sizes and digests, as reported by the ranks that wrote them.

No directory is listed to write or check it: on a network file system a listing may lack files that another
node has just written.
"""

import hashlib
import json
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import content_digest, read_small, sync

MANIFEST = "manifest.json"

Entries = dict[str, dict[str, Any]]


def describe_files(files: Iterable[Path], folder: Path) -> Entries:
    """Flush `files` below `folder` to disk and return their sizes and digests by relative name.

    Call this in the process that wrote the files: other hosts may not see their bytes yet.

    Raises:
        OSError: a file cannot be written to disk or read again.
    """
    entries: Entries = {}
    for file in files:
        sync(file)
        entries[str(file.relative_to(folder))] = _entry(file)
    return entries


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write the manifest of `folder`, with a digest of the manifest itself."""
    content = {"files": entries, "digest": _digest(entries)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def write_part(folder: Path, rank: int, entries: Entries) -> None:
    """Write the entries of one rank's files, which are on disk, for a start that finds no manifest."""
    (folder / _part(rank)).write_text(json.dumps(entries))


def read_parts(folder: Path, ranks: int) -> Entries:
    """Return the entries of all ranks' files, which are there in the right sizes.

    Raises:
        OSError: a rank has not written all its files, or a part cannot be read.
        ValueError: a part is damaged, or a file has another size.
    """
    parts = [json.loads(read_small(folder / _part(rank))) for rank in range(ranks)]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("a part is no list of files")
    entries = {name: entry for part in parts for name, entry in part.items()}
    _check_entries(entries)
    if not _have_sizes(folder, entries):
        raise ValueError("a file has another size")
    return entries


def remove_parts(folder: Path) -> None:
    """Remove what `write_part` has written for all ranks."""
    for part in folder.glob(_part("*")):
        part.unlink()


def _part(rank: int | str) -> str:
    return f"written-{rank}.json"


def read_manifest(folder: Path) -> Entries:
    """Return the entries that `write_manifest` wrote.

    Raises:
        OSError: the manifest is missing or cannot be read.
        ValueError: the manifest was changed, or names files outside `folder`.
    """
    try:
        content = json.loads(read_small(folder / MANIFEST))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    entries = content.get("files") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or content.get("digest") != _digest(entries):
        raise ValueError("its list of files differs from its digest")
    _check_entries(entries)
    return entries


def _check_entries(entries: Entries) -> None:
    for name, entry in entries.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"it names {name!r}, which is not below the checkpoint")
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
            raise ValueError(f"it has no size of {name!r}")


def _have_sizes(folder: Path, entries: Entries) -> bool:
    return all((folder / name).stat().st_size == entry["bytes"] for name, entry in entries.items())


def has_all_files(folder: Path) -> bool:
    """Return whether `folder` has all files of its manifest in the right sizes, without reading them."""
    try:
        return _have_sizes(folder, read_manifest(folder))
    except (OSError, ValueError):
        return False


def find_faults(folder: Path, part: int, parts: int) -> list[str]:
    """Read every `parts`-th file of the manifest, starting at `part`, and return the faults found."""
    try:
        entries = read_manifest(folder)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    faults = []
    for name in sorted(entries)[part::parts]:
        try:
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()) or not stat.S_ISREG(file.stat().st_mode):
                faults.append(f"{name} is a link to another folder, or no file")
            elif _entry(file) != entries[name]:
                faults.append(f"{name} differs from its digest")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror}")
    return faults


def damaged_checkpoint(folder: Path, faults: Sequence[str]) -> CheckpointError:
    """Return the error of a named checkpoint with `faults`."""
    is_gone = not folder.is_dir()
    return CheckpointError(
        "the checkpoint has been removed" if is_gone else "the checkpoint is damaged",
        where=str(folder),
        got="; ".join(faults[:5]),
        remedy="name another checkpoint; a run that trains keeps its last ones (trainer.keep_last)"
        if is_gone
        else "restore its files, or name another checkpoint",
    )


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "digest": content_digest([file])}


def _digest(entries: Entries) -> str:
    return hashlib.blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=16).hexdigest()
