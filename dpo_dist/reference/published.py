"""The form in which a store is published for others, who fetch single entries of it (`reference.behind`).

    store.json                          format; of each fingerprint its `space.json`, shards and entries
    <fingerprint>/<digest>.entries      an `ENTRY` for each intact entry, sorted by key; the digest is its own
    <fingerprint>/<digest>.safetensors  the shards as they are, of which readers fetch ranges
    <fingerprint>/space.json            with it the folder is a store itself; `recipe.json`, if there is one

The list is written last, so that nobody reads of files that are not there yet.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.files import staged_file
from dpo_dist.foundation.remote import is_url, open_file_system, remote_errors
from dpo_dist.reference.store import (
    FETCHED,
    FINGERPRINT_FILE,
    RECIPE_FILE,
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
    return hashlib.sha256(content).digest()[:16]  # in hardware, unlike BLAKE2


def open_place(place: str) -> tuple[Any, str]:
    """Return the fsspec file system of a folder or URL, and the path there."""
    url = place if is_url(place) else f"file://{Path(place).expanduser().resolve()}"
    system, path = open_file_system(url)
    return system, path.rstrip("/")


class Pushed(NamedTuple):
    """What was published of a fingerprint.

    `damaged`: files that were left out, or have entries left out. `unconfirmed`: files that were left out, as
    they were fetched and no model here was compared with them.
    """

    label: str
    entries: int
    bytes: int
    damaged: int
    unconfirmed: int


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
        tables = []
        damaged = unconfirmed = stored = 0
        for name in list_shards(folder):
            if (folder / name).with_suffix(FETCHED).exists():
                unconfirmed += 1
                continue
            shard = open_shard(folder / name)
            table: Any = [] if shard is None else _intact_entries(shard, len(names))
            damaged += shard is None or len(table) < len(shard.keys)
            if len(table):
                names.append(name)
                tables.append(table)
                stored += (folder / name).stat().st_size
                place.send(folder / name, f"{folder.name}/{name}")
        if not names:
            pushed.append(Pushed(fingerprint.label, 0, 0, damaged, unconfirmed))
            continue
        joined = np.concatenate(tables)
        # Of those with the same key the first is read, as in a store.
        entries = joined[np.lexsort((joined["shard"], joined["key"][:, 1], joined["key"][:, 0]))]
        content = entries.tobytes()
        digest = values_digest(content).hex()
        place.send(content, f"{folder.name}/{digest}.entries")
        place.send((folder / FINGERPRINT_FILE).read_bytes(), f"{folder.name}/{FINGERPRINT_FILE}")
        recipe = (folder / RECIPE_FILE).read_bytes() if (folder / RECIPE_FILE).exists() else b"{}"
        place.send(recipe, f"{folder.name}/{RECIPE_FILE}")
        listed[folder.name] = {
            "space": fingerprint.as_dict(),
            "shards": names,
            "entries": digest,
            "bytes": len(content),
            "numbers": int(entries["numbers"].sum(dtype=np.int64)),
            "recipe": json.loads(recipe),
            "license": terms,
        }
        pushed.append(Pushed(fingerprint.label, len(entries), stored + len(content), damaged, unconfirmed))
    if not listed:
        fetched = sum(each.unconfirmed for each in pushed)
        raise ReferenceModelError(
            "no intact entry can be published",
            where=str(folders[0].parent),
            got=f"{fetched} shards that were fetched and never compared with the model" if fetched else "",
            remedy="see dpo-dist store verify; a run that has the model confirms what was fetched",
        )
    text = json.dumps({"format": PUBLISHED_FORMAT, "fingerprints": listed}, indent=1, sort_keys=True)
    place.send(text.encode(), LIST)
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


class _Target:
    """A folder or URL to which files are sent; a file in a folder appears whole."""

    def __init__(self, place: str):
        self._url = place
        self._system, self._path = open_place(place)

    def send(self, content: bytes | Path, name: str) -> None:
        """Write bytes, or copy a file, unless one of its size is there: shards are named by their content."""
        path = f"{self._path}/{name}"
        with remote_errors(self._url):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            staged = contextlib.nullcontext(path) if is_url(self._url) else staged_file(Path(path))
            if isinstance(content, bytes):
                with staged as place:
                    self._system.pipe_file(str(place), content)
            elif not self._system.exists(path) or self._system.size(path) != content.stat().st_size:
                with staged as place:
                    self._system.put_file(str(content), str(place))
