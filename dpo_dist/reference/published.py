"""The form in which a store is published for others, who fetch single entries of it (`reference.behind`).

    store.json                          format; of each fingerprint its `space.json`, shards and entries
    <fingerprint>/<digest>.entries      an `ENTRY` for each intact entry, sorted by key; the digest is its own
    <fingerprint>/<digest>.safetensors  the shards as they are, of which readers fetch ranges
    <fingerprint>/space.json            with it the folder is a store itself; `recipe.json`, if there is one

The list is written last, so that nobody reads of files that are not there yet.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.files import staged_file
from dpo_dist.foundation.remote import is_url, open_file_system, remote_errors
from dpo_dist.reference.store import (
    FINGERPRINT_FILE,
    RECIPE_FILE,
    ReferenceFingerprint,
    Shard,
    list_shards,
    open_shard,
    read_fingerprint,
)

LIST = "store.json"
PUBLISHED_FORMAT = 1
ENTRY = np.dtype(
    [("key", "<u8", 2), ("shard", "<u4"), ("start", "<u8"), ("numbers", "<u4"), ("digest", "u1", 16)]
)
"""Key; number of the shard in the list; place and number of the float32 values in it; digest of these."""


def values_digest(content: Any) -> bytes:
    """Return the digest of bytes, 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def open_place(place: str) -> tuple[Any, str]:
    """Return the fsspec file system of a folder or URL, and the path there."""
    url = place if is_url(place) else f"file://{Path(place).expanduser().resolve()}"
    system, path = open_file_system(url)
    return system, path.rstrip("/")


@dataclass(frozen=True)
class Pushed:
    """What was published of a fingerprint; `damaged`: files that were left out, or have entries left out."""

    fingerprint: ReferenceFingerprint
    entries: int
    bytes: int
    damaged: int


def push(folders: Sequence[Path], target: str, terms: str = "") -> list[Pushed]:
    """Publish the intact entries of the folders of fingerprints at `target`, a folder or a URL.

    A shard that is there already is not sent again. The list names these fingerprints alone, with the license
    `terms`. Raises DataError for a target that cannot be written, ReferenceModelError if nothing is intact.
    """
    place = _Target(target)
    listed = dict[str, Any]()
    pushed = list[Pushed]()
    for folder in folders:
        fingerprint = read_fingerprint(folder)
        if fingerprint is None:
            continue
        names = list[str]()
        tables = [np.empty(0, ENTRY)]
        damaged = 0
        stored = 0
        for name in list_shards(folder):
            shard = open_shard(folder / name)
            table = np.empty(0, ENTRY) if shard is None else _intact_entries(shard, len(names))
            damaged += shard is None or len(table) < len(shard.keys)
            if len(table):
                names.append(name)
                tables.append(table)
                stored += (folder / name).stat().st_size
                place.send_file(folder / name, f"{folder.name}/{name}")
        entries = _sorted_by_key(np.concatenate(tables))
        if not len(entries):
            continue
        content = entries.tobytes()
        digest = values_digest(content).hex()
        place.send(content, f"{folder.name}/{digest}.entries")
        place.send_file(folder / FINGERPRINT_FILE, f"{folder.name}/{FINGERPRINT_FILE}")
        recipe = folder / RECIPE_FILE
        if recipe.exists():
            place.send_file(recipe, f"{folder.name}/{RECIPE_FILE}")
        listed[folder.name] = {
            "space": fingerprint.as_dict(),
            "shards": names,
            "entries": digest,
            "bytes": len(content),
            "numbers": int(entries["numbers"].sum(dtype=np.int64)),
            "recipe": json.loads(recipe.read_bytes()) if recipe.exists() else {},
            "license": terms,
        }
        pushed.append(Pushed(fingerprint, len(entries), stored + len(content), damaged))
    if not pushed:
        raise ReferenceModelError(
            "no intact entry can be published",
            where=str(folders[0].parent),
            remedy="dpo-dist store verify says what is damaged",
        )
    content = json.dumps({"format": PUBLISHED_FORMAT, "fingerprints": listed}, indent=1, sort_keys=True)
    place.send(content.encode(), LIST)
    return pushed


def _intact_entries(shard: Shard, number: int) -> Any:
    """Return an `ENTRY` for each intact entry of a shard, with this `number` in the list."""
    values = shard.values.view(np.uint8)
    ends = 4 * shard.ends
    table = np.empty(len(shard.keys), ENTRY)
    table["key"] = shard.keys
    table["shard"] = number
    table["start"] = shard.starts
    table["numbers"] = shard.lengths
    for row, start, end in zip(table, ends - 4 * shard.lengths, ends, strict=True):
        row["digest"] = np.frombuffer(values_digest(values[start:end].data), np.uint8)
    return table[shard.are_intact()]


def _sorted_by_key(table: Any) -> Any:
    """Return entries sorted by key; of those with the same one that of the first shard, as a store has it."""
    order = np.lexsort((table["shard"], table["key"][:, 1], table["key"][:, 0]))
    ordered = table[order]
    is_first = np.ones(len(ordered), dtype=np.bool_)
    is_first[1:] = (ordered["key"][1:] != ordered["key"][:-1]).any(axis=1)
    return ordered[is_first]


class _Target:
    """A folder or URL to which files are sent; a file in a folder appears whole."""

    def __init__(self, place: str):
        self._url = place
        self._system, self._path = open_place(place)
        self._is_folder = not is_url(place)

    def send(self, content: bytes, name: str) -> None:
        """Write a file."""
        path = self._begin(name)
        with remote_errors(self._url):
            if self._is_folder:
                with staged_file(Path(path)) as staged:
                    staged.write_bytes(content)
            else:
                self._system.pipe_file(path, content)

    def send_file(self, file: Path, name: str) -> None:
        """Copy a file, unless a file of its size is there: shards are named by their content."""
        path = self._begin(name)
        with remote_errors(self._url):
            if self._system.exists(path) and self._system.size(path) == file.stat().st_size:
                return
            if self._is_folder:
                with staged_file(Path(path)) as staged:
                    self._system.put_file(str(file), str(staged))
            else:
                self._system.put_file(str(file), path)

    def _begin(self, name: str) -> str:
        path = f"{self._path}/{name}"
        with remote_errors(self._url):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path
