"""Read the records of one file, each with its line number."""

import codecs
import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from dpo_dist.data.csv_records import check_columns, read_csv
from dpo_dist.data.records import BadRecord, Origin, RawRecord, shown_key
from dpo_dist.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED_KINDS = (".jsonl", ".json", ".csv")
_MAX_RECORD_BYTES = 2**26
_MAX_UNPACKED_ARRAY_BYTES = 2**30
_PARQUET_BATCH_RECORDS = 1024
_BLOCK_BYTES = 2**22


def file_kind(file: Path) -> str | None:
    """Return a file's extension without that of its compression; None if such files cannot be read."""
    if file.suffix in _COMPRESSIONS:
        inner = Path(file.stem).suffix
        return inner if inner in _COMPRESSED_KINDS else None
    return file.suffix if file.suffix in KINDS else None


def read_file(file: Path, path: str) -> Iterator[RawRecord]:
    """Read records in the file's order, streamed except for a .json array.

    A record of .jsonl or .csv above 64 MiB is never loaded as a whole; it becomes a bad record.

    Args:
        file: .jsonl, .json (one array), .csv, any of these as .gz or .zst, or .parquet.
        path: the source as configured, for origins.

    Returns:
        Each record or the reason why it cannot be read, and its origin: the 1-based line of its start in
        .jsonl and .csv, its number elsewhere.

    Raises:
        DataError: the file cannot be read; raised by this call if the start of the file shows it.
    """
    with _damage_as_data_error(path):
        return _records(file, path)


def _records(file: Path, path: str) -> Iterator[RawRecord]:
    match file_kind(file):
        case ".jsonl":
            records = _jsonl_records(_open(file), path)
        case ".json":
            records = with_origins(_json_values(file), path)
        case ".csv":
            # Bytes that are not UTF-8 become lone surrogates, so that only their own record is bad.
            text = io.TextIOWrapper(_open(file), "utf-8-sig", "surrogateescape", newline="")
            records = read_csv(text, path, _MAX_RECORD_BYTES)
        case ".parquet":
            records = with_origins(_parquet_values(file), path)
        case _:
            raise _unknown_kind(file, path)
    return _guarded(records, path)


def check_kind(file: Path, path: str) -> None:
    """Check the extension of a file.

    Raises:
        DataError: `read_file` cannot read such files.
    """
    if file_kind(file) is None:
        raise _unknown_kind(file, path)


def _unknown_kind(file: Path, path: str) -> DataError:
    return DataError(
        "this kind of file cannot be read",
        where=path,
        got=file.suffix or "a name without an extension",
        expected=f"{', '.join(KINDS)}; {', '.join(_COMPRESSED_KINDS)} also as .gz or .zst",
        remedy="convert or rename the file; the extension of a file with one JSON object per line is .jsonl",
    )


def _guarded(records: Iterator[RawRecord], path: str) -> Iterator[RawRecord]:
    with _damage_as_data_error(path):
        yield from records


@contextlib.contextmanager
def _damage_as_data_error(path: str) -> Iterator[None]:
    """Raise DataError for errors of the file system and of decompression."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as fault:
        raise DataError(
            "the file cannot be read to its end",
            where=path,
            got=str(fault).splitlines()[0],
            remedy="check the file; if it is damaged or incomplete, write or download it again",
        ) from fault


def _open(file: Path) -> BinaryIO:
    """Open a UTF-8 text file as a stream of uncompressed bytes."""
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


def with_origins(values: Iterator[Any], path: str) -> Iterator[RawRecord]:
    """Yield each value as a record with its number as origin; any value but an object is a bad record."""
    for number, value in enumerate(values, start=1):
        yield _as_record(value, Origin(path, number))


def _as_record(value: Any, origin: Origin) -> RawRecord:
    match value:
        case Mapping():
            return value, origin
        case ValueError():
            return BadRecord("unparsable", origin, reason(value)), origin
    return BadRecord("unparsable", origin, f"a {type(value).__name__} instead of an object"), origin


def _jsonl_records(stream: BinaryIO, path: str) -> Iterator[RawRecord]:
    for number, line in enumerate(_lines(stream), start=1):
        if not line.strip():
            continue
        origin = Origin(path, number)
        if len(line) > _MAX_RECORD_BYTES:
            yield BadRecord("unparsable", origin, f"a line of more than {_MAX_RECORD_BYTES} bytes"), origin
            continue
        try:
            value = parse_json(line)
        except (ValueError, RecursionError) as fault:
            yield BadRecord("unparsable", origin, reason(fault)), origin
        else:
            yield _as_record(value, origin)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines as bytes, split at newlines only (not at Unicode separators); only the start of a line
    that is too long for a record.
    """
    while line := stream.readline(_MAX_RECORD_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = stream.readline(_BLOCK_BYTES)


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError (also for a duplicate key in an object) or RecursionError."""
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {shown_key(twice)} twice")
    return fields


def reason(fault: Exception) -> str:
    """Return why parsing failed, without quoting the text."""
    match fault:
        case json.JSONDecodeError():
            return f"{fault.msg} at character {fault.pos + 1}"
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {fault.start + 1}"
        case RecursionError():
            return "nested too deeply"
    return str(fault)


def _json_values(file: Path) -> Iterator[Any]:
    with _open(file) as stream:
        content = stream.read(_MAX_UNPACKED_ARRAY_BYTES + 1 if file.suffix in _COMPRESSIONS else -1)
    if file.suffix in _COMPRESSIONS and len(content) > _MAX_UNPACKED_ARRAY_BYTES:
        raise DataError(
            "a compressed JSON array is too large to be read at once",
            where=str(file),
            got=f"more than {_MAX_UNPACKED_ARRAY_BYTES} bytes when unpacked",
            remedy="write one object per line (.jsonl.gz or .jsonl.zst), which is read line by line",
        )
    try:
        values = parse_json(content)
    except (ValueError, RecursionError) as fault:
        raise DataError(
            "the file is not JSON",
            where=str(file),
            got=reason(fault) if content.strip() else "an empty file",
            expected="one array of objects",
            remedy="rename a file with one object per line to .jsonl",
        ) from fault
    if not isinstance(values, list):
        raise DataError(
            "the JSON file is not an array",
            where=str(file),
            got=f"a {type(values).__name__}",
            expected="one array of objects",
            remedy="rename a file with one object per line to .jsonl",
        )
    return iter(values)


def _parquet_values(file: Path) -> Iterator[Any]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as fault:
        raise DataError("the file is not Parquet", where=str(file), got=str(fault)) from fault
    check_columns(table.schema_arrow.names, str(file))
    batches = table.iter_batches(batch_size=_PARQUET_BATCH_RECORDS)
    return (value for batch in batches for value in _batch_values(batch))


def _batch_values(batch: pyarrow.RecordBatch) -> Iterator[Any]:
    """Yield the records of a batch; for a record with text that is not UTF-8 the error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as fault:
        if len(batch) == 1:
            yield fault
            return
        for index in range(len(batch)):
            yield from _batch_values(batch.slice(index, 1))
