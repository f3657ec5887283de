"""Reader of wandb's file of a run: the rows that an offline run has already.

The file `run-*.wandb` is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) with a
header of 7 bytes: blocks of 32 KiB, in which every chunk has a checksum (4 bytes), a length (2), and a type
(1: whole, 2 to 4: first, middle and last part of a record).
"""

import contextlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from wandb.proto import wandb_internal_pb2

_BLOCK_BYTES = 32 * 1024
_CHUNK_HEADER = struct.Struct("<IHB")
_FILE_HEADER_BYTES = 7


def read_records(path: Path) -> Iterator[Any]:
    """Yield the protobuf records of a file in the order of writing, up to the first incomplete one."""
    content = path.read_bytes()
    parts, position = b"", _FILE_HEADER_BYTES
    while position + _CHUNK_HEADER.size <= len(content):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _CHUNK_HEADER.size:
            position += left
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(content, position)
        position += _CHUNK_HEADER.size + length
        if position > len(content) or kind == 0:
            return
        parts += content[position - length : position]
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_rows(folder: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run in all files of its starts, oldest first, with wandb's own keys (`_step`).

    Of a damaged file, as a full disk or a crash of the node leaves it, these are the rows before the damage.
    """
    for path in sorted(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"), key=_start_time):
        with contextlib.suppress(DecodeError, ValueError):
            for record in read_records(path):
                if record.WhichOneof("record_type") == "history":
                    yield _row(record.history.item)


def _row(items: Iterable[Any]) -> dict[str, Any]:
    """Return a row, with the fields of a table or a histogram as a mapping."""
    row: dict[str, Any] = {}
    for item in items:
        name, *field = [item.key] if item.key else item.nested_key
        value = json.loads(item.value_json)
        if field:
            row.setdefault(name, {})["/".join(field)] = value
        else:
            row[name] = value
    return row


def drop_empty(folder: Path, run_id: str) -> None:
    """Delete files without a record, which a killed start leaves behind: `wandb sync` fails on them."""
    for path in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        if path.stat().st_size <= _FILE_HEADER_BYTES:
            path.unlink()


def _start_time(path: Path) -> str:
    """Return the time in a name such as `offline-run-20260102_030405-<id>`."""
    return path.parent.name.removeprefix("offline-").split("-")[1]
