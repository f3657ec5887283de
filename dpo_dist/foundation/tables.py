"""Arrow files with a digest behind: written whole, read once for the digest, then mapped by all processes."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo_dist.foundation.files import (
    MEMO_FOLDER,
    content_digest,
    file_identity,
    recall,
    remember,
    staged_file,
    temporary_folder,
)

Array: TypeAlias = npt.NDArray[Any]
TableFacts: TypeAlias = dict[str, Any]
"""Values of JSON."""

_DIGEST_BYTES = 16


@contextmanager
def write_table(final: Path, schema: pa.Schema) -> Iterator[Any]:
    """Yield a writer of batches; what it wrote becomes the file `final`. Raises OSError."""
    with staged_file(final) as staged:
        with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            yield writer
        digest = content_digest([staged])
        with staged.open("ab") as end:
            end.write(bytes.fromhex(digest))


def map_table(file: Path) -> pa.Table | None:
    """Map a file of `write_table`; None if there is no file, or it is damaged.

    It is read for its digest again only if its `file_identity` has changed. The metadata of a table without
    its own are its digest.
    """
    try:
        identity = file_identity(file)
        memo = file.parent / MEMO_FOLDER
        content = pa.memory_map(str(file)).read_buffer()
        end = max(content.size - _DIGEST_BYTES, 0)
        records = content.slice(0, end)
        digest = content.slice(end).to_pybytes().hex()
        if recall(memo, identity) != digest:
            if hashlib.blake2b(records, digest_size=_DIGEST_BYTES).hexdigest() != digest:
                return None
            remember(memo, identity, digest)
        table = pa.ipc.open_file(records).read_all()
        return table.replace_schema_metadata(table.schema.metadata or {"digest": digest})
    except (OSError, pa.ArrowInvalid):
        return None


def stored_digest(file: Path) -> str:
    """Return the digest behind the content of a file of `write_table`."""
    with file.open("rb") as stream:
        stream.seek(-_DIGEST_BYTES, os.SEEK_END)
        return stream.read().hex()


class Columns:
    """Columns that grow chunk by chunk, in files of a folder: they take no memory."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._lengths: Counter[str] = Counter()

    def append(self, **chunks: Array) -> None:
        """Append values to columns by name; all chunks of a column have one type. Raises OSError."""
        for name, values in chunks.items():
            kind = (values.dtype, values.shape[1:])
            assert self._kinds.setdefault(name, kind) == kind, f"{name} has another type: {kind}"
            with (self._folder / name).open("ab") as file:
                # Not `tofile`: on a full disk it loses the last values without an error.
                file.write(np.ascontiguousarray(values).data)
            self._lengths[name] += len(values)

    def __contains__(self, name: str) -> bool:
        return name in self._kinds

    def __getitem__(self, name: str) -> Array:
        """Map a column that has values. Raises OSError: some of them are missing."""
        dtype, shape = self._kinds[name]
        file = self._folder / name
        length = self._lengths[name]
        expected = length * math.prod(shape) * dtype.itemsize
        size = file.stat().st_size
        if size != expected:
            raise OSError(f"{file} has {size} bytes in place of the {expected} that were written")
        return np.memmap(file, dtype, mode="r", shape=(length, *shape))

    def write(self, file: Path, facts: TableFacts) -> None:
        """Write a table of one row, a list of values for each column, with `facts` in its metadata."""
        kinds = {name: (str(dtype), list(shape)) for name, (dtype, shape) in self._kinds.items()}
        values = [pa.array(_plain(self[name])) for name in kinds]
        lists = [pa.LargeListArray.from_arrays(pa.array([0, len(v)], pa.int64()), v) for v in values]
        batch = pa.record_batch(lists, names=list(kinds))
        metadata = {"facts": json.dumps({**facts, "kinds": kinds})}
        with write_table(file, batch.schema.with_metadata(metadata)) as writer:
            writer.write_batch(batch)


def _plain(values: Array) -> Array:
    """Return values in one dimension; Arrow would pack booleans to bits."""
    return values.ravel().view(np.uint8) if values.dtype == np.bool_ else values.ravel()


def stored_columns(
    file: Path, made_from: TableFacts, build: Callable[[Columns], TableFacts]
) -> tuple[dict[str, Any], TableFacts]:
    """Map the columns in `file`, and return the facts beside them; `build` and write them if they are absent.

    They are absent too if the file is damaged, or they were made from something else. Raises OSError.
    """
    mapped_columns = _mapped(file, made_from)
    if mapped_columns is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(file) as folder:
            columns = Columns(folder)
            columns.write(file, {**build(columns), "made_from": made_from})
        mapped_columns = _mapped(file, made_from)
    if mapped_columns is None:
        raise OSError(f"{file} changed after it was written")
    return mapped_columns


def _mapped(file: Path, made_from: TableFacts) -> tuple[dict[str, Any], TableFacts] | None:
    """Map the columns in `file`; None if there are none that were made from this."""
    table = map_table(file)
    facts = {} if table is None else json.loads((table.schema.metadata or {}).get(b"facts", "{}"))
    if table is None or facts.get("made_from") != made_from:
        return None
    arrays = dict[str, Any]()
    for name, (dtype, shape) in facts["kinds"].items():
        arrays[name] = table[name].chunk(0).values.to_numpy().view(dtype).reshape(-1, *shape)
    return arrays, facts
