"""Rows of one file, each with the line it stands on."""

import codecs
import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from dpo_dist.data.csv_records import read_csv
from dpo_dist.data.records import BadRecord, Origin, RawRecord, shown_key
from dpo_dist.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED_KINDS = (".jsonl", ".json", ".csv")
_MAX_RECORD_BYTES = 2**26
_MAX_UNPACKED_ARRAY_BYTES = 2**30
_PARQUET_BATCH_ROWS = 1024
_BLOCK_BYTES = 2**22


def file_kind(file: Path) -> str | None:
    """The ending by which a file is read, without that of its compression; None if it cannot be read."""
    if file.suffix in _COMPRESSIONS:
        inner = Path(file.stem).suffix
        return inner if inner in _COMPRESSED_KINDS else None
    return file.suffix if file.suffix in KINDS else None


def read_file(file: Path, path: str) -> Iterator[RawRecord]:
    """Rows in the file's order, streamed except for a .json array. No record of .jsonl or .csv above 64 MiB
    is held in memory; it is a bad one.

    Args:
        file: .jsonl, .json (one array), .csv, any of these as .gz or .zst, or .parquet.
        path: the source as configured, for origins.

    Returns:
        Each row or why it is none, and its origin: true 1-based line numbers for .jsonl and .csv (where the
        record starts), record numbers elsewhere.

    Raises:
        DataError: the file cannot be read; by this call where its beginning shows it, else when it is met.
    """
    with _damage_told(path):
        return _rows(file, path)


def _rows(file: Path, path: str) -> Iterator[RawRecord]:
    match file_kind(file):
        case ".jsonl":
            rows = _jsonl_rows(_opened(file), path)
        case ".json":
            rows = with_origins(_json_rows(file), path)
        case ".csv":
            # What is not UTF-8 becomes a lone surrogate, which makes its record a bad one and no other.
            text = io.TextIOWrapper(_opened(file), "utf-8-sig", "surrogateescape", newline="")
            rows = read_csv(text, path, _MAX_RECORD_BYTES)
        case ".parquet":
            rows = with_origins(_parquet_rows(file), path)
        case _:
            raise _unknown_kind(file, path)
    return _guarded(rows, path)


def check_kind(file: Path, path: str) -> None:
    """Refuse a file that `read_file` does not read, by its ending.

    Raises:
        DataError: it has another ending.
    """
    if file_kind(file) is None:
        raise _unknown_kind(file, path)


def _unknown_kind(file: Path, path: str) -> DataError:
    return DataError(
        "this kind of file cannot be read",
        where=path,
        got=file.suffix or "a name without an ending",
        expected=f"{', '.join(KINDS)}; {', '.join(_COMPRESSED_KINDS)} also as .gz or .zst",
        remedy="convert or rename the file; a file with one JSON object per line ends in .jsonl",
    )


def _guarded(rows: Iterator[RawRecord], path: str) -> Iterator[RawRecord]:
    with _damage_told(path):
        yield from rows


@contextlib.contextmanager
def _damage_told(path: str) -> Iterator[None]:
    """Raise DataError for what the file system and decompression raise."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as fault:
        raise DataError(
            "the file cannot be read to its end",
            where=path,
            got=str(fault).splitlines()[0],
            remedy="check the file; if it is damaged or cut short, write or download it again",
        ) from fault


def _opened(file: Path) -> BinaryIO:
    """The unpacked bytes of a file of UTF-8 text."""
    packed = file.open("rb")
    stream = packed
    if file.suffix in _COMPRESSIONS:
        unpacked = pyarrow.CompressedInputStream(packed, _COMPRESSIONS[file.suffix])
        stream = io.BufferedReader(unpacked, _BLOCK_BYTES)
    if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(
            "the file is not UTF-8",
            where=str(file),
            got="UTF-16",
            remedy="convert it, for example by iconv -f UTF-16 -t UTF-8",
        )
    return stream


def with_origins(rows: Iterator[Any], path: str) -> Iterator[RawRecord]:
    """Rows with their record number as origin; what is no object is a bad record."""
    for number, row in enumerate(rows, start=1):
        yield _object(row, Origin(path, number))


def _object(row: Any, origin: Origin) -> RawRecord:
    match row:
        case Mapping():
            return row, origin
        case ValueError():
            return BadRecord("unparsable", origin, reason(row)), origin
    return BadRecord("unparsable", origin, f"a {type(row).__name__} where an object is expected"), origin


def _jsonl_rows(stream: BinaryIO, path: str) -> Iterator[RawRecord]:
    for number, line in enumerate(_lines(stream), start=1):
        if not line.strip():
            continue
        origin = Origin(path, number)
        if len(line) > _MAX_RECORD_BYTES:
            yield BadRecord("unparsable", origin, f"a line of more than {_MAX_RECORD_BYTES} bytes"), origin
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as fault:
            yield BadRecord("unparsable", origin, reason(fault)), origin
        else:
            yield _object(row, origin)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines as bytes: only a newline ends one, whatever Unicode separators it has. Of one that is too long
    for a record only the start.
    """
    while line := stream.readline(_MAX_RECORD_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = stream.readline(_BLOCK_BYTES)


def parse_json(content: bytes) -> Any:
    """The value that UTF-8 bytes write; ValueError (a key that an object has twice too) or RecursionError."""
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {shown_key(twice)} twice")
    return fields


def reason(fault: Exception) -> str:
    """Why parsing failed, without the text that failed to parse."""
    match fault:
        case json.JSONDecodeError():
            return f"{fault.msg} at character {fault.pos + 1}"
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {fault.start + 1}"
        case RecursionError():
            return "nested too deeply"
    return str(fault)


def _json_rows(file: Path) -> Iterator[Any]:
    with _opened(file) as stream:
        content = stream.read(_MAX_UNPACKED_ARRAY_BYTES + 1 if file.suffix in _COMPRESSIONS else -1)
    if file.suffix in _COMPRESSIONS and len(content) > _MAX_UNPACKED_ARRAY_BYTES:
        raise DataError(
            "a compressed JSON array is too large to be read at once",
            where=str(file),
            got=f"more than {_MAX_UNPACKED_ARRAY_BYTES} bytes when unpacked",
            remedy="write one object per line (.jsonl.gz or .jsonl.zst), which is read line by line",
        )
    try:
        rows = parse_json(content)
    except (ValueError, RecursionError) as fault:
        raise DataError(
            "the file is not JSON",
            where=str(file),
            got=reason(fault) if content.strip() else "an empty file",
            expected="one array of objects",
            remedy="a file with one object per line has to be named .jsonl",
        ) from fault
    if not isinstance(rows, list):
        raise DataError(
            "the file holds no array",
            where=str(file),
            got=f"a {type(rows).__name__}",
            expected="one array of objects",
            remedy="a file with one object per line has to be named .jsonl",
        )
    return iter(rows)


def _parquet_rows(file: Path) -> Iterator[Any]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as fault:
        raise DataError("the file is not Parquet", where=str(file), got=str(fault)) from fault
    names = table.schema_arrow.names
    if len(set(names)) < len(names):
        raise DataError(
            "two columns have the same name",
            where=str(file),
            got=", ".join(map(shown_key, names)),
            expected="a name of its own for each column",
        )
    return (row for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS) for row in _batch_rows(batch))


def _batch_rows(batch: pyarrow.RecordBatch) -> Iterator[Any]:
    """The rows of a batch; where a text is not UTF-8, the error in place of its row."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as fault:
        if len(batch) == 1:
            yield fault
            return
        for place in range(len(batch)):
            yield from _batch_rows(batch.slice(place, 1))
