"""Manifest of a checkpoint: its files with sizes and digests, as reported by the ranks that wrote them.

No directory is listed to make or to check it: on a network file system a listing may lack files that another
node has just written.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_dist.atomic import sync
from dpo_dist.digests import content_digest

MANIFEST = "manifest.json"

Entries = dict[str, dict[str, Any]]


@contextlib.contextmanager
def recorded_writes(checkpoint_engine: Any) -> Iterator[list[Path]]:
    """Yield a list that receives every file DeepSpeed writes through `checkpoint_engine` within the block."""
    save, written = checkpoint_engine.save, []

    def recorded(state_dict: Any, path: str) -> None:
        written.append(Path(path))
        save(state_dict, path)

    checkpoint_engine.save = recorded
    try:
        yield written
    finally:
        checkpoint_engine.save = save


def describe_files(files: Iterable[Path], folder: Path) -> Entries:
    """Flush `files` below `folder` to disk and return size and digest of each, by relative name.

    To be called by the process that wrote them: only its own host is sure to have their bytes.

    Raises:
        OSError: a file cannot be written to disk or read again.
    """
    entries: Entries = {}
    for file in files:
        sync(file)
        entries[str(file.relative_to(folder))] = _entry(file)
    return entries


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write the manifest of `folder`, with a digest of its own."""
    content = {"files": entries, "digest": _digest(entries)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def read_manifest(folder: Path) -> Entries:
    """Return what `write_manifest` wrote.

    Raises:
        OSError: there is no manifest, or it cannot be read.
        ValueError: it is not what was written.
    """
    content = json.loads((folder / MANIFEST).read_bytes())
    entries = content.get("files") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or content.get("digest") != _digest(entries):
        raise ValueError("its list of files differs from its digest")
    return entries


def has_all_files(folder: Path) -> bool:
    """Return whether `folder` has a manifest and every file of it in its size; contents are not read."""
    try:
        entries = read_manifest(folder)
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in entries.items())
    except (OSError, ValueError):
        return False


def find_faults(folder: Path, part: int, parts: int) -> list[str]:
    """Read every `parts`-th file of the manifest, from the `part`-th on, and return what is wrong."""
    try:
        entries = read_manifest(folder)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    faults = []
    for name in sorted(entries)[part::parts]:
        try:
            if _entry(folder / name) != entries[name]:
                faults.append(f"{name} differs from its digest")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror}")
    return faults


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "digest": content_digest([file])}


def _digest(entries: Entries) -> str:
    return hashlib.blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=16).hexdigest()
