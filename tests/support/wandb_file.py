"""Read back what wandb wrote: records, rows, tables and histograms of ``run-*.wandb`` files.

Such a file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) with a header of
7 bytes: blocks of 32 KiB with chunks of a checksum (4 bytes), a length (2), and a type (1: whole, 2 to 4:
first, middle and last part of a record).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32 * 1024, 7


def records_of(run_dir: Path, kind: str) -> list[Any]:
    """The records of a kind of all starts of a run, oldest first."""
    paths = sorted(
        run_dir.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name.split("run-")[1]
    )
    records = [record for path in paths for record in _records(path)]
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def _records(path: Path) -> Iterator[Any]:
    content, parts, position = path.read_bytes(), b"", HEADER
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        position += HEADER + length
        if position > len(content) or kind == 0:
            return
        parts += content[position - length : position]
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def all_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of all starts of a run with wandb's own keys (`_step`); a table or histogram is a mapping."""
    found = []
    for history in records_of(run_dir, "history"):
        row: dict[str, Any] = {}
        for item in history.item:
            name, *field = [item.key] if item.key else item.nested_key
            value = json.loads(item.value_json)
            row[name] = row.get(name, {}) | {"/".join(field): value} if field else value
        found.append(row)
    return found


def numbers_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row without wandb's own keys, tables and histograms."""
    return {
        key: value for key, value in row.items() if not key.startswith("_") and not isinstance(value, dict)
    }


def history_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The logged numbers of all starts of a run, oldest first, without wandb's own keys."""
    return [numbers_of(row) for row in all_rows(run_dir)]


def media_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The tables and histograms of the same rows."""
    rows = all_rows(run_dir)
    return [{key: value for key, value in row.items() if isinstance(value, dict)} for row in rows]
