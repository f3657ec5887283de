"""Read the records of one file, each with its line number: JSON lines, JSON, CSV, Parquet."""

import codecs
import contextlib
import csv
import io
import re
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow
import pyarrow.parquet

from dpo_dist.data.messages import fault_of, parse_json, with_given_arguments
from dpo_dist.data.records import BadRecord, Origin, RawRecord, shown_key
from dpo_dist.foundation.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 2**20
_GZIP = b"\x1f\x8b"
_SIGNATURES = {_GZIP: "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet", b"PK\x03\x04": "zip"}
# Text shrinks to a third or a tenth, the same record again and again to a hundredth.
_MAX_EXPANSION = 400
_UNCHECKED_BYTES = 2**26


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


def open_bytes(file: Path, meter: Meter) -> BinaryIO:
    """Open a UTF-8 text file.

    Raises:
        DataError: it is UTF-16, compressed (twice) or Parquet; while reading: it expands far more than text
            can.
    """
    packed = file.open("rb")
    start = packed.peek(2)[:2]
    if file.suffix == ".gz" and start and start != _GZIP:
        raise DataError(
            "the content of the file does not fit its name",
            where=str(file),
            got="no gzip",
            expected=file.suffix,
            remedy="rename the file, if it is not compressed; else write or download it again",
        )
    meter.start(file, lambda: file.stat().st_size if packed.closed else packed.tell())
    stream: Any = packed
    if file.suffix in COMPRESSIONS:
        stream = io.BufferedReader(_Unpacked(packed, file), BLOCK_BYTES)
    start = stream.peek(4)[:4]
    if kind := next((kind for sign, kind in _SIGNATURES.items() if start.startswith(sign)), ""):
        raise DataError(
            "the content of the file does not fit its name",
            where=str(file),
            got=kind,
            expected=file.suffix,
            remedy="rename the file, for example to pairs.jsonl.gz, pairs.jsonl.zst or pairs.parquet",
        )
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(
            "the file is not UTF-8",
            where=str(file),
            got="UTF-16",
            remedy="convert it, for example by iconv -f UTF-16 -t UTF-8",
        )
    opened: BinaryIO = stream
    return opened


class _Unpacked(io.RawIOBase):
    """The uncompressed bytes of a file."""

    def __init__(self, packed: BinaryIO, file: Path):
        self._packed = packed
        self._file = file
        self._stream = pyarrow.CompressedInputStream(packed, COMPRESSIONS[file.suffix])
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._size += len(content)
        if self._size > _UNCHECKED_BYTES and self._size > _MAX_EXPANSION * self._packed.tell():
            raise DataError(
                "the compressed file expands far more than text can",
                where=str(self._file),
                got=f"{self._packed.tell():,} bytes have become {self._size:,}",
                expected=f"at most {_MAX_EXPANSION} times as many",
                remedy="check the origin of the file; if it is right, unpack it",
            )
        return len(content)


_QUOTE = re.compile(r'(?P<opening>(?:^|,)")|"(?=,|\s*$)')
_MAX_CELL_CHARACTERS = 2**31 - 1
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Replaces a line that is too long to load; as a record it has too few cells.
_TOO_LONG_LINE = "\0too long\0"


def read_csv(text: TextIO, path: str, max_characters: int) -> Iterator[RawRecord]:
    """Read the header now, and the records as the iterator advances.

    Args:
        text: opened with ``newline=""``.
        path: for origins and errors.
        max_characters: limit of a record; a longer one is a bad record.

    Raises:
        DataError: the header cannot be parsed, has a column twice, or other separators; raised by this call.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    lines = _Lines(text, max_characters)
    names, fault = lines.cells()
    if names is None and fault:
        raise DataError(
            "the header of the CSV file cannot be parsed",
            where=f"{path}:1",
            got=fault,
            remedy="write the names of the columns in the first line",
        )
    header = names or []
    check_columns(header, f"{path}:1")
    _check_separator(header, f"{path}:1")
    return _csv_records(lines, path, header)


def check_columns(names: list[str], where: str) -> None:
    """Check that the names of columns differ.

    Raises:
        DataError: two columns have the same name.
    """
    if len(set(names)) < len(names):
        raise DataError(
            "two columns have the same name",
            where=where,
            got=", ".join(map(shown_key, names)),
            expected="a different name for each column",
            remedy="rename one of them in the file",
        )


def _check_separator(header: list[str], where: str) -> None:
    """Check that a single name is not several with another separator. Raises DataError."""
    found = [name for sign, name in _OTHER_SEPARATORS.items() if len(header) == 1 and sign in header[0]]
    if found:
        raise DataError(
            "the columns of the CSV file are not separated by commas",
            where=where,
            got=f"one name with {found[0]}",
            expected="names separated by commas",
            remedy="write the file again with commas",
        )


def _csv_records(lines: "_Lines", path: str, header: list[str]) -> Iterator[RawRecord]:
    while True:
        origin = Origin(path, lines.number)
        cells, fault = lines.cells()
        if not lines.taken:
            return
        if cells is not None and len(cells) != len(header) and len(lines.taken) > 1:
            fault = f"{len(cells)} cells for {len(header)} columns, on {len(lines.taken)} lines"
            cells = None
        if cells is None:
            yield BadRecord("unparsable", origin, fault), origin
            for number in lines.go_back():
                inside = Origin(path, number)
                yield BadRecord("unparsable", inside, f"inside the record that starts at {origin}"), inside
        elif len(cells) > len(header):
            yield BadRecord("unparsable", origin, f"{len(cells)} cells for {len(header)} columns"), origin
        elif cells:
            yield dict(zip(header, cells, strict=False)), origin


class _Lines:
    """Lines of a text; lines of the last record can be read again.

    Attributes:
        number: number of the next line, 1-based.
        taken: lines of the last record.
    """

    def __init__(self, text: TextIO, max_characters: int):
        self.number = 1
        self.taken: list[str] = []
        self._text = text
        self._max_characters = max_characters
        self._ahead: deque[str] = deque()

    def cells(self) -> tuple[list[str] | None, str]:
        """Return the cells of the next record, or None and the error; at the end `taken` is empty."""
        self.taken = []
        try:
            # Strict: a quote that is never closed is an error, not one giant cell.
            return next(csv.reader(self._feed(), strict=True), None), ""
        except csv.Error as fault:
            return None, str(fault)

    def go_back(self) -> Iterator[int]:
        """Put back all taken lines but the first; skip the rest of its damaged cell and yield those lines."""
        others = self.taken[1:]
        self._ahead.extendleft(reversed(others))
        self.number -= len(others)
        for _ in range(self._rest_of_cell()):
            yield self.number
            self._take()

    def _feed(self) -> Iterator[str]:
        size = 0
        while line := self._take():
            self.taken.append(line)
            size += len(line)
            if line == _TOO_LONG_LINE or size > self._max_characters:
                raise csv.Error(f"more than {self._max_characters} characters")
            yield line

    def _take(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._read()
        self.number += bool(line)
        return line

    def _read(self) -> str:
        line = self._text.readline(self._max_characters)
        if len(line) < self._max_characters or line.endswith("\n"):
            return line
        while line and not line.endswith("\n"):
            line = self._text.readline(self._max_characters)
        return _TOO_LONG_LINE

    def _rest_of_cell(self) -> int:
        """Return how many of the next lines belong to an unclosed cell; 0 if the next quote opens a cell."""
        size = 0
        for count, line in enumerate(self._peeked(), start=1):
            if found := _QUOTE.search(line):
                return 0 if found["opening"] else count
            size += len(line)
            if size > self._max_characters:
                break
        return 0

    def _peeked(self) -> Iterator[str]:
        yield from self._ahead
        while line := self._read():
            self._ahead.append(line)
            yield line


_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TO_SIGN = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb")*+", re.DOTALL)
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+", re.DOTALL)
_TO_QUOTE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BLOCK_BYTES = 2**20
_MAX_DEPTH = 1_000_000


def split_array(stream: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Yield the bytes of each element of an array; None for one that is longer than `max_bytes`.

    Args:
        stream: positioned after the opening bracket of the array.
        max_bytes: about as much is in memory at a time.

    Raises:
        ValueError: the array does not end, text follows it, or it is no data: a million brackets are open.
    """
    elements = _Elements(max_bytes)
    while block := stream.read(_BLOCK_BYTES):
        yield from elements.of(block)
    if elements.depth:
        raise ValueError("the file ends inside the array")


class _Elements:
    """Finds the elements in consecutive blocks of the text of an array.

    Attributes:
        depth: number of open brackets, the array's included; 0 after its end.
    """

    def __init__(self, max_bytes: int):
        self.depth = 1
        self._max_bytes = max_bytes
        self._in_string = False
        self._is_escaped = False
        self._found = 0
        self._parts: list[bytes] = []
        self._size = 0

    def of(self, block: bytes) -> Iterator[bytes | None]:
        """Yield the elements that end in this block."""
        start = position = 0
        while (position := self._next_sign(block, position)) < len(block):
            sign = block[position : position + 1]
            position += 1
            self.depth += (sign in b"[{") - (sign in b"]}")
            if self.depth > _MAX_DEPTH:
                raise ValueError(f"brackets are nested more than {_MAX_DEPTH:,} levels deep")
            if self.depth == 0 or (self.depth == 1 and sign == b","):
                self._keep(block[start : position - 1])
                start = position
                yield from self._element()
            if self.depth == 0:
                break
        if self.depth:
            self._keep(block[start:])
        elif block[start:].strip():
            raise ValueError("text follows the array")

    def _next_sign(self, block: bytes, position: int) -> int:
        """Return the position of the next bracket or separating comma outside strings, or the block's end."""
        if not self.depth:
            return len(block)
        if self._in_string:
            position = self._after_string(block, position)
        while position < len(block):
            found = (_TO_SIGN if self.depth == 1 else _TO_BRACKET).match(block, position)
            position = found.end() if found else position
            if block[position : position + 1] != b'"':
                return position
            # A string that does not end in this block.
            self._in_string = True
            position = self._after_string(block, position + 1)
        return position

    def _after_string(self, block: bytes, position: int) -> int:
        found = _TO_QUOTE.match(block, position + self._is_escaped)
        position = found.end() if found else len(block)
        self._is_escaped = block[position : position + 1] == b"\\"
        self._in_string = block[position : position + 1] != b'"'
        return len(block) if self._in_string else position + 1

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._max_bytes:
            self._parts.append(part)
        else:
            self._parts.clear()

    def _element(self) -> Iterator[bytes | None]:
        content = b"".join(self._parts).strip()
        is_long = self._size > self._max_bytes
        self._parts, self._size = [], 0
        if is_long or content or self._found or self.depth:
            self._found += 1
            yield None if is_long else content


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
