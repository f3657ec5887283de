"""Reader of wandb's file of a run: the rows that an offline run has already.

The file `run-*.wandb` is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) with a
header of 7 bytes: blocks of 32 KiB, in which every chunk has a checksum (4 bytes), a length (2), and a type
(1: whole, 2 to 4: first, middle and last part of a record).
"""

import contextlib
import json
import struct
from collections.abc import Iterator
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
    """Yield the rows of a run in all files of its starts with wandb's own keys (`_step`), oldest first.

    A table or a histogram is a mapping. Of a damaged file, the rows before the damage are read.
    """
    for path in sorted(_files(folder, run_id), key=lambda path: path.parent.name.split("run-")[1]):
        with contextlib.suppress(DecodeError, ValueError):
            for record in read_records(path):
                if record.WhichOneof("record_type") == "history":
                    row: dict[str, Any] = {}
                    for item in record.history.item:
                        name, *field = [item.key] if item.key else item.nested_key
                        value = json.loads(item.value_json)
                        row[name] = row.get(name, {}) | {"/".join(field): value} if field else value
                    yield row


def last_row(folder: Path, run_id: str) -> dict[str, Any] | None:
    """Return the last row, by wandb's number, of all starts; wandb itself does not read it.

    Files without a record, which a killed start leaves behind, are deleted: `wandb sync` fails on them.
    """
    for path in _files(folder, run_id):
        if path.stat().st_size <= _FILE_HEADER_BYTES:
            path.unlink()
    return max(read_rows(folder, run_id), key=lambda row: row["_step"], default=None)


def _files(folder: Path, run_id: str) -> list[Path]:
    return list(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"))
