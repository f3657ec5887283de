"""Read the records of one file, each with its line number."""

import contextlib
import io
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from dpo_dist.data.files.byte_stream import BLOCK_BYTES, COMPRESSIONS, Meter, open_bytes
from dpo_dist.data.files.csv_records import check_columns, read_csv
from dpo_dist.data.files.json_array import split_array
from dpo_dist.data.files.json_values import fault_of, parse_json, with_given_arguments
from dpo_dist.data.records import BadRecord, Origin, RawRecord
from dpo_dist.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_COMPRESSED_KINDS = (".jsonl", ".json", ".csv")
_MAX_RECORD_BYTES = 2**24
_TOO_LONG = "above 16 MiB"
_CONVERT = "convert or rename the file; the extension of a file with one JSON object per line is .jsonl"
_UNPACK = "unpack it, or compress it by gzip or zstd"
_OTHER_KINDS = {
    **dict.fromkeys((".bz2", ".xz", ".lzma", ".zip", ".tar"), _UNPACK),
    ".tsv": "write it with commas between the columns, as .csv",
}
_PARQUET_BATCH_RECORDS = 64
_PARQUET_BATCH_BYTES = 2**22
_BEFORE_ARRAY = b" \t\r\n\xef\xbb\xbf"
_MAX_BEFORE_ARRAY_BYTES = 4096


def file_kind(file: Path) -> str | None:
    """Return a file's extension without that of its compression; None if such files cannot be read."""
    if file.suffix in COMPRESSIONS:
        inner = Path(file.stem).suffix
        return inner if inner in _COMPRESSED_KINDS else None
    return file.suffix if file.suffix in KINDS else None


def read_file(file: Path, path: str, meter: Meter) -> Iterator[RawRecord]:
    """Read records in the file's order, in bounded memory.

    A record above 16 MiB is a bad record; but for Parquet it is never loaded as a whole.

    Args:
        file: .jsonl, .json (one array), .csv, any of these as .gz or .zst, or .parquet.
        path: the source as configured, for origins.
        meter: of the source.

    Returns:
        Each record or the reason why it cannot be read, and its origin: the 1-based line of its start in
        .jsonl and .csv, its number elsewhere.

    Raises:
        DataError: the file cannot be read; raised by this call if the start of the file shows it.
    """
    with _damage_as_data_error(path):
        return _records(file, path, meter)


def _records(file: Path, path: str, meter: Meter) -> Iterator[RawRecord]:
    match file_kind(file):
        case ".jsonl":
            records = _jsonl_records(open_bytes(file, meter), path)
        case ".json":
            records = with_origins(_json_values(file, meter), path)
        case ".csv":
            # Bytes that are not UTF-8 become lone surrogates, so that only their own record is bad.
            text = io.TextIOWrapper(open_bytes(file, meter), "utf-8-sig", "surrogateescape", newline="")
            records = read_csv(text, path, _MAX_RECORD_BYTES)
        case ".parquet":
            records = table_records(_parquet_values(file, meter), path)
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
        remedy=_OTHER_KINDS.get(file.suffix, _CONVERT),
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


def with_origins(values: Iterator[Any], path: str) -> Iterator[RawRecord]:
    """Yield each value as a record with its number as origin; any value but an object is a bad record."""
    for number, value in enumerate(values, start=1):
        yield _as_record(value, Origin(path, number))


def table_records(values: Iterator[Any], path: str) -> Iterator[RawRecord]:
    """Yield the rows of a table as `with_origins`, tool calls with the arguments that they were given."""
    return with_origins(map(with_given_arguments, values), path)


def _as_record(value: Any, origin: Origin) -> RawRecord:
    match value:
        case Mapping():
            return value, origin
        case ValueError():
            return BadRecord("unparsable", origin, fault_of(value)), origin
    return BadRecord("unparsable", origin, f"a {type(value).__name__} instead of an object"), origin


def _jsonl_records(stream: BinaryIO, path: str) -> Iterator[RawRecord]:
    for number, line in enumerate(_lines(stream), start=1):
        if not line.strip().removeprefix(BOM_UTF8):
            continue
        origin = Origin(path, number)
        if len(line) > _MAX_RECORD_BYTES:
            yield BadRecord("unparsable", origin, _TOO_LONG), origin
        else:
            yield _as_record(_parsed(line), origin)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines as bytes, split at newlines only (not at Unicode separators); only the start of a line
    that is too long for a record.
    """
    while line := stream.readline(_MAX_RECORD_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = stream.readline(BLOCK_BYTES)


def _json_values(file: Path, meter: Meter) -> Iterator[Any]:
    stream = open_bytes(file, meter)
    first = b""
    for _ in range(_MAX_BEFORE_ARRAY_BYTES):
        byte = stream.read(1)
        first = byte.strip(_BEFORE_ARRAY)
        if first or not byte:
            break
    if first == b"[":
        return _elements(file, stream)
    raise DataError(
        "the JSON file is not an array",
        where=str(file),
        got="an object" if first == b"{" else "no array at its start" if first else "an empty file",
        expected="one array of objects",
        remedy="rename a file with one object per line to .jsonl",
    )


def _elements(file: Path, stream: BinaryIO) -> Iterator[Any]:
    """Yield the values of an array; the error for one that cannot be parsed."""
    try:
        for content in split_array(stream, _MAX_RECORD_BYTES):
            if content:
                yield _parsed(content)
            else:
                yield ValueError(_TOO_LONG if content is None else "no value beside a comma")
    except ValueError as fault:
        raise DataError(
            "the file is not JSON",
            where=str(file),
            got=str(fault),
            expected="one array of objects",
            remedy="check the file; if it is incomplete, write or download it again",
        ) from fault


def _parsed(content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError as fault:
        return fault


def _parquet_values(file: Path, meter: Meter) -> Iterator[Any]:
    try:
        # Buffered: else a whole column of a row group is loaded at once.
        table = pyarrow.parquet.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False)
    except (OSError, ValueError) as fault:
        raise DataError(
            "the file is not Parquet",
            where=str(file),
            got=str(fault),
            remedy="write or download it again",
        ) from fault
    check_columns(table.schema_arrow.names, str(file))
    return _rows(table, file, meter)


def _rows(table: pyarrow.parquet.ParquetFile, file: Path, meter: Meter) -> Iterator[Any]:
    read = 0
    per_row = file.stat().st_size / max(table.metadata.num_rows, 1)
    meter.start(file, lambda: int(read * per_row))
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        # Sizes are of encoded values; equal cells are stored once.
        mean_bytes = group.total_byte_size // max(group.num_rows, 1)
        rows = max(1, min(_PARQUET_BATCH_RECORDS, _PARQUET_BATCH_BYTES // max(mean_bytes, 1)))
        for batch in table.iter_batches(batch_size=rows, row_groups=[number]):
            yield from _batch_values(batch)
            read += len(batch)


def _batch_values(batch: pyarrow.RecordBatch) -> Iterator[Any]:
    """Yield the records of a batch; the error for a record that is too long or has text that is not UTF-8."""
    if len(batch) == 1 and batch.nbytes > _MAX_RECORD_BYTES:
        yield ValueError(_TOO_LONG)
        return
    try:
        if batch.nbytes <= _MAX_RECORD_BYTES:
            yield from batch.to_pylist()
            return
    except UnicodeDecodeError as fault:
        if len(batch) == 1:
            yield fault
            return
    for index in range(len(batch)):
        yield from _batch_values(batch.slice(index, 1))
