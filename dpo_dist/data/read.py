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
_SPACES = re.compile(r"\s*")
_LOOK_AHEAD = 16
"""Characters behind which a number, escape or literal has ended that the end of a block may cut."""


class Meter:
    """The share of the bytes of a source's files that has been read.

    Attributes:
        total: bytes of all files; None if it is unknown.
    """

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
            remedy="convert, unpack or rename the file; the extension of a file with one JSON object per "
            "line is .jsonl",
        )


def read_file(file: Path, path: str, meter: Meter) -> Iterator[RawRecord]:
    """Read records in the file's order, in bounded memory.

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
    check_kind(file, path)
    with _as_data_error(path):
        match file_kind(file):
            case ".jsonl":
                records = _jsonl_records(_opened(file, meter), path)
            case ".json":
                records = with_origins(_array(_opened(file, meter), path), path)
            case ".csv":
                records = _csv_records(_opened(file, meter), path)
            case _:
                # Buffered: else a whole column of a row group is loaded at once.
                table = pyarrow.parquet.ParquetFile(file, buffer_size=_BLOCK_BYTES, pre_buffer=False)
                _check_columns(table.schema_arrow.names, path)
                records = table_records(_rows(table, file, meter), path)
    return _guarded(records, path)


def with_origins(values: Iterable[Any], path: str) -> Iterator[RawRecord]:
    """Yield each value as a record with its number as origin; any value but an object is a bad record."""
    for number, value in enumerate(values, start=1):
        yield _as_record(value, Origin(path, number))


def table_records(values: Iterable[Any], path: str) -> Iterator[RawRecord]:
    """Yield the rows of a table as `with_origins`, tool calls with the arguments that they were given."""
    return with_origins(map(with_given_arguments, values), path)


_ARGUMENTS = ("arguments", "parameters")


def with_given_arguments(value: Any) -> Any:
    """Return a value of a table without the nulls with which it fills the arguments of tool calls."""
    if isinstance(value, Mapping):
        return {
            name: without_nulls(item) if name in _ARGUMENTS else with_given_arguments(item)
            for name, item in value.items()
        }
    return [with_given_arguments(item) for item in value] if isinstance(value, list) else value


def _guarded(records: Iterator[RawRecord], path: str) -> Iterator[RawRecord]:
    with _as_data_error(path):
        yield from records


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


def _as_record(value: Any, origin: Origin) -> RawRecord:
    if isinstance(value, Mapping):
        return value, origin
    return BadRecord("unparsable", origin, f"a {type(value).__name__} instead of an object"), origin


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
    """Yield the elements of a JSON array."""
    if not stream.peek(1024).lstrip().startswith(b"["):  # type: ignore[attr-defined]
        raise DataError(
            "the JSON file is not an array",
            where=path,
            expected="one array of objects",
            remedy="rename a file with one object per line to .jsonl",
        )
    return iter(_Elements(io.TextIOWrapper(stream, "utf-8")))


class _Elements:
    """Elements of an array, parsed one at a time as lines of JSON: it may be larger than memory."""

    def __init__(self, stream: TextIO):
        self._stream, self._text, self._at, self._is_whole = stream, "", 0, False

    def __iter__(self) -> Iterator[Any]:
        self._take()  # the bracket
        if self._character() == "]":
            self._take()
        else:
            yield self._element()
            while (separator := self._take()) == ",":
                yield self._element()
            if separator != "]":
                raise ValueError("no comma after an element")
        if self._character():
            raise ValueError("text after the array")

    def _element(self) -> Any:
        self._character()
        while True:
            try:
                value, end = JSON.raw_decode(self._text, self._at)
                is_cut = end > len(self._text) - _LOOK_AHEAD
            except json.JSONDecodeError as fault:
                is_cut = fault.pos > len(self._text) - _LOOK_AHEAD or fault.msg.startswith("Unterminated")
                if self._is_whole or not is_cut:
                    raise
            if self._is_whole or not is_cut:
                self._at = end
                return value
            self._read_on()

    def _take(self) -> str:
        found = self._character()
        self._at += 1
        return found

    def _character(self) -> str:
        """Skip spaces, and return the next character; "" at the end."""
        while True:
            self._at = _SPACES.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._is_whole:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def _read_on(self) -> None:
        block = self._stream.read(_BLOCK_BYTES)
        self._text, self._at, self._is_whole = self._text[self._at :] + block, 0, not block


def _csv_records(stream: BinaryIO, path: str) -> Iterator[RawRecord]:
    """Read the header now, and the records as the iterator advances."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    # Bytes that are not UTF-8 become lone surrogates, so that only their own record is bad.
    rows = csv.reader(io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline=""), strict=True)
    header = next(rows, [])
    _check_columns(header, f"{path}:1")
    return _of_rows(rows, header, path)


def _of_rows(rows: Any, header: list[str], path: str) -> Iterator[RawRecord]:
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
            expected="a different name for each column",
            remedy="rename one of them in the file",
        )


def _rows(table: pyarrow.parquet.ParquetFile, file: Path, meter: Meter) -> Iterator[Any]:
    read = 0
    per_row = file.stat().st_size / max(table.metadata.num_rows, 1)
    meter.start(file, lambda: int(read * per_row))
    for batch in table.iter_batches(batch_size=_BATCH_RECORDS):
        yield from batch.to_pylist()
        read += len(batch)
