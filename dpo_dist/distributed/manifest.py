"""Manifest of a checkpoint: its files with sizes and digests, as reported by the ranks that wrote them.

No directory is listed to write or check it: on a network file system a listing may lack files that another
node has just written.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import content_digest, text_digest

MANIFEST = "manifest.json"


class FileEntry(TypedDict):
    """Size and digest of a file."""

    bytes: int
    digest: str


Entries = dict[str, FileEntry]
"""The files of a checkpoint, by name relative to its folder."""


def write_file(file: Path, content: bytes) -> FileEntry:
    """Write a file to disk and return its entry."""
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    return {"bytes": len(content), "digest": hashlib.blake2b(content, digest_size=16).hexdigest()}


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write the manifest of `folder`, with a digest of the manifest itself."""
    content = {"files": entries, "digest": _digest(entries)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def read_manifest(folder: Path) -> Entries:
    """Return the entries that `write_manifest` wrote."""
    content = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(content, dict) or content.get("digest") != _digest(content.get("files")):
        raise ValueError("its list of files differs from its digest")
    entries: Entries = content["files"]
    return entries


def has_all_files(folder: Path) -> bool:
    """Return whether `folder` has all files of its manifest in the right sizes, without reading them."""
    try:
        entries = read_manifest(folder)
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in entries.items())
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
            if content_digest([folder / name]) != entries[name]["digest"]:
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


def _digest(entries: Any) -> str:
    return text_digest(json.dumps(entries, sort_keys=True))
