"""Read back what wandb wrote: the records of a ``run-*.wandb`` file.

The file is a LevelDB log with a 7-byte header: blocks of 32 KiB, in which every chunk has a checksum
(4 bytes), a length (2), and a type (1: whole, 2 to 4: first, middle and last part of a record).
"""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK_BYTES = 32 * 1024
_CHUNK_HEADER = struct.Struct("<IHB")
_FILE_HEADER_BYTES = 7


def read_records(path: Path) -> list[Any]:
    """The protobuf records of the file, in the order of writing."""
    content = path.read_bytes()
    records, parts = [], b""
    position = _FILE_HEADER_BYTES
    while position + _CHUNK_HEADER.size <= len(content):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _CHUNK_HEADER.size:
            position += left
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(content, position)
        position += _CHUNK_HEADER.size
        parts += content[position : position + length]
        position += length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def history_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The logged rows of all wandb files below `run_dir`, oldest first, without wandb's own keys."""
    rows = []
    for path in sorted(run_dir.glob("wandb/*run-*/run-*.wandb")):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows
