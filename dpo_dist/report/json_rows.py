"""Read the rows of a JSON lines file that may be large or damaged, one at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MOST_ROW_BYTES = 32 * 2**20

Row = dict[str, Any]


def json_rows(file: Path, most_bytes: int | None = None) -> Iterator[Row | None]:
    """Yield the rows of a file in its order; None for a line that is no JSON object or over 32 MiB.

    Args:
        file: its path; a missing file has no rows.
        most_bytes: reading ends with the line that exceeds them. None: the whole file.

    Raises:
        OSError: the file exists and cannot be read.
    """
    try:
        opened = file.open("rb")
    except FileNotFoundError:
        return
    read = 0
    with opened:
        while line := opened.readline(MOST_ROW_BYTES):
            read += len(line)
            if line.endswith(b"\n") or len(line) < MOST_ROW_BYTES:
                if line.strip():
                    yield _row(line)
            else:
                while (rest := opened.readline(MOST_ROW_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield None
            if most_bytes is not None and read > most_bytes:
                return


def text_of(row: Mapping[str, Any], name: str) -> str | None:
    """Return a field of a row; None if it is missing or no text."""
    value = row.get(name)
    return value if isinstance(value, str) else None


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
