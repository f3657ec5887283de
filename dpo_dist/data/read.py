"""Read the records of one file, each with its line number: JSON lines, JSON, CSV, Parquet."""

import contextlib
import csv
import io
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import pyarrow
import pyarrow.parquet

from dpo_dist.data.messages import JSON, fault_of, parse_json, without_nulls
from dpo_dist.data.records import BadRecord, Origin, RawRecord, shown_key
from dpo_dist.foundation.errors import DataError, first_line

KINDS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED_KINDS = (".jsonl", ".json", ".csv")
_BLOCK_BYTES = 2**20
_BATCH_RECORDS = 64
_MAX_CELL_CHARACTERS = 2**31 - 1
_ARGUMENTS = ("arguments", "parameters")
_SPACES = re.compile(r"\s*")


class Meter:
    """The share of the bytes of a source's files that has been read; `total` is None if it is unknown."""

    def __init__(self) -> None:
        self.total: int | None = None
        self._done = 0
        self._size = 0
        self._position: Callable[[], int] = int

    def start(self, file: Path, position: Callable[[], int]) -> None:
        """Begin the next file; `position` returns the number of its bytes that have been read."""
        self._done += self._size
        self._size = file.stat().st_size
        self._position = position

    @property
    def share(self) -> float | None:
        """The share that has been read, from 0 to 1; None if the total is unknown."""
        if not self.total:
            return None
        return min(1.0, (self._done + min(self._position(), self._size)) / self.total)


def file_kind(file: Path) -> str | None:
    """Return a file's extension without that of its compression; None if such files cannot be read."""
    if file.suffix in COMPRESSIONS:
        inner = Path(file.stem).suffix
        return inner if inner in _COMPRESSED_KINDS else None
    return file.suffix if file.suffix in KINDS else None


def check_kind(file: Path, path: str) -> None:
    """Check that `read_file` can read files with this extension. Raises DataError."""
    if file_kind(file) is None:
        raise DataError(
            "this kind of file cannot be read",
            where=path,
            got=file.suffix or "a name without an extension",
            expected=f"{', '.join(KINDS)}; {', '.join(_COMPRESSED_KINDS)} also as .gz or .zst",
            remedy="convert, unpack or rename the file; one with a JSON object per line is a .jsonl",
        )


def read_file(file: Path, path: str, meter: Meter) -> Iterator[RawRecord]:
    """Yield the records of a file, or why they cannot be read, in its order and in bounded memory.

    Their origin is `path` with the 1-based line of their start in .jsonl and .csv, their number elsewhere.
    Raises DataError: the file cannot be read.
    """
    with _as_data_error(path):
        match file_kind(file):
            case ".jsonl":
                yield from _jsonl_records(_opened(file, meter), path)
            case ".json":
                yield from _numbered(_array(_opened(file, meter), path), path)
            case ".csv":
                yield from _csv_records(_opened(file, meter), path)
            case _:
                yield from table_records(_rows(file, path, meter), path)


def table_records(rows: Iterable[Any], path: str) -> Iterator[RawRecord]:
    """Yield the rows of a table with their numbers, tool calls with the arguments that they were given."""
    return _numbered(map(_with_given_arguments, rows), path)


def _with_given_arguments(value: Any) -> Any:
    """Return a value of a table without the nulls with which it fills the arguments of tool calls."""
    if isinstance(value, Mapping):
        return {
            name: without_nulls(item) if name in _ARGUMENTS else _with_given_arguments(item)
            for name, item in value.items()
        }
    return [_with_given_arguments(item) for item in value] if isinstance(value, list) else value


def _numbered(values: Iterable[Any], path: str) -> Iterator[RawRecord]:
    return (_as_record(value, Origin(path, number)) for number, value in enumerate(values, start=1))


def _as_record(value: Any, origin: Origin) -> RawRecord:
    if isinstance(value, Mapping):
        return value, origin
    return BadRecord("unparsable", origin, f"a {type(value).__name__} instead of an object"), origin


@contextlib.contextmanager
def _as_data_error(path: str) -> Iterator[None]:
    """Raise DataError for errors of the file system, of decompression and of parsing."""
    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException, csv.Error) as fault:
        raise DataError(
            "the file cannot be read to its end",
            where=path,
            # Some texts go on with an excerpt of the file, which is not shown.
            got=first_line(fault).partition("\\n")[0].rstrip(),
            expected="a whole file of the kind that its name says; a .json file is one array of objects",
            remedy="check the file; if it is damaged or incomplete, write or download it again",
        ) from fault


def _opened(file: Path, meter: Meter) -> BinaryIO:
    """Open a file that may be compressed, after its byte-order mark."""
    stored = file.open("rb")
    meter.start(file, lambda: file.stat().st_size if stored.closed else stored.tell())
    stream = stored
    if file.suffix in COMPRESSIONS:
        unpacked = pyarrow.input_stream(stored, compression=COMPRESSIONS[file.suffix])
        stream = io.BufferedReader(unpacked, _BLOCK_BYTES)
    if stream.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
        stream.read(len(BOM_UTF8))
    return cast(BinaryIO, stream)


def _jsonl_records(stream: BinaryIO, path: str) -> Iterator[RawRecord]:
    # Lines of bytes end at newlines only, not at Unicode separators.
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        origin = Origin(path, number)
        try:
            yield _as_record(parse_json(line), origin)
        except ValueError as fault:
            yield BadRecord("unparsable", origin, fault_of(fault)), origin


def _array(stream: BinaryIO, path: str) -> Iterator[Any]:
    if not stream.peek(1024).lstrip().startswith(b"["):  # type: ignore[attr-defined]
        raise DataError(
            "the JSON file is not an array",
            where=path,
            expected="one array of objects",
            remedy="rename a file with one object per line to .jsonl",
        )
    return _elements(io.TextIOWrapper(stream, "utf-8"))


def _elements(stream: TextIO) -> Iterator[Any]:
    """Yield the elements of a JSON array as they are parsed: it may be larger than memory."""
    text = stream.read(_BLOCK_BYTES)
    at = _after_spaces(text, text.index("[") + 1)
    separator = ","
    if text[at : at + 1] == "]":
        separator, at = "]", at + 1
    while separator == ",":
        at = _after_spaces(text, at)
        try:
            value, end = JSON.raw_decode(text, at)
            end = _after_spaces(text, end)
        except json.JSONDecodeError:
            end = len(text)
        if end < len(text):
            yield value
            separator, at = text[end], end + 1
        elif block := stream.read(max(_BLOCK_BYTES, len(text) - at)):
            text, at = text[at:] + block, 0  # the end of the last block has cut the element
        else:
            JSON.raw_decode(text, at)
            raise ValueError("the array is not closed")
    if separator != "]" or text[at:].strip() or stream.read().strip():
        raise ValueError("no comma after an element, or text after the array")


def _after_spaces(text: str, at: int) -> int:
    return _SPACES.match(text, at).end()  # type: ignore[union-attr]


def _csv_records(stream: BinaryIO, path: str) -> Iterator[RawRecord]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    # Bytes that are not UTF-8 become lone surrogates, so that only their own record is bad.
    rows = csv.reader(io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline=""), strict=True)
    header = next(rows, [])
    _check_columns(header, f"{path}:1")
    line = rows.line_num + 1
    for cells in rows:
        origin, line = Origin(path, line), rows.line_num + 1
        if len(cells) > len(header):
            yield BadRecord("unparsable", origin, f"{len(cells)} cells for {len(header)} columns"), origin
        elif cells:
            yield dict(zip(header, cells, strict=False)), origin


def _check_columns(names: list[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(
            "two columns have the same name",
            where=where,
            got=", ".join(map(shown_key, names)),
            remedy="rename one of them in the file",
        )


def _rows(file: Path, path: str, meter: Meter) -> Iterator[Any]:
    # Buffered: else a whole column of a row group is loaded at once.
    table = pyarrow.parquet.ParquetFile(file, buffer_size=_BLOCK_BYTES, pre_buffer=False)
    _check_columns(table.schema_arrow.names, path)
    read = 0
    per_row = file.stat().st_size / max(table.metadata.num_rows, 1)
    meter.start(file, lambda: int(read * per_row))
    for batch in table.iter_batches(batch_size=_BATCH_RECORDS):
        yield from batch.to_pylist()
        read += len(batch)
