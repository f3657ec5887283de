"""Read the records of a file: JSON lines, JSON, CSV, TSV, Parquet or Arrow; write records as JSON lines."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from dpo_dist.data.read.images import as_file
from dpo_dist.data.read.messages import ARGUMENTS
from dpo_dist.data.read.plain import NOT_UTF8, parse_json, without_nulls
from dpo_dist.data.records import MAX_RECORD_BYTES, BadRecord, Origin, RawRecord, shown_key
from dpo_dist.foundation.errors import ConfigError, DataError, first_line
from dpo_dist.foundation.files import staged_file, text_digest, write_text

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_COMPRESSED_KINDS = (".jsonl", ".json", *_SEPARATORS)
_KINDS = (*_COMPRESSED_KINDS, ".parquet", ".arrow")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK_BYTES = 2**20
_BATCH_RECORDS = 64
# Compressed text expands less than this: a file that expands more could fill the memory or the disk.
_MAX_EXPANSION = 100
# An Arrow array of texts holds less than 2**31 bytes; Python needs a multiple of it.
_MAX_BATCH_BYTES = 2**28
SUFFIXES = (*_KINDS, *_COMPRESSIONS)
_EXTENSION = b"ARROW:extension:name"


def file_kind(file: PurePath) -> str | None:
    """Return a file's extension without that of a compression; None if such files cannot be read."""
    if file.suffix in _COMPRESSIONS:
        inner = Path(file.stem).suffix
        return inner if inner in _COMPRESSED_KINDS else None
    return file.suffix if file.suffix in _KINDS else None


def check_kind(file: PurePath, path: str) -> None:
    """Check that files of this kind can be read; `path` names the source. Raises DataError."""
    if file_kind(file) is None:
        raise DataError(
            "this kind of file cannot be read",
            where=path,
            got=file.suffix or "a name without an extension",
            expected=f"{', '.join(_KINDS)}; {', '.join(_COMPRESSED_KINDS)} also as .gz or .zst",
            remedy="convert, unpack or rename the file: one with a JSON object per line is a .jsonl",
        )


def read_file(file: Path, path: str, folders: Sequence[Path] = ()) -> Iterator[RawRecord]:
    """Yield a file's records in order, bad ones with the reason; only a .json is read whole.

    A record's origin is `path` with its first line, counted from 1; in tables and .json with its number.
    The files that a record names are looked up in `folders`, then in the folder of its own file.
    Raises DataError: the file cannot be read.
    """
    try:
        match file_kind(file):
            case ".jsonl":
                values = _lines(_opened(file))
            case ".json":
                elements = parse_json(_opened(file).read())
                if not isinstance(elements, list):
                    raise ValueError("its JSON is no list of records")
                values = enumerate(elements, start=1)
            case ".csv" | ".tsv" as kind:
                values = _table_lines(_opened(file), path, _SEPARATORS[kind])
            case ".arrow":
                values = enumerate(_table_rows(pyarrow.ipc.open_stream(file)), start=1)
            case _:
                values = enumerate(_parquet_rows(file, path), start=1)
        yield from numbered_records(values, path, (*folders, file.parent))
    except (OSError, ValueError, pyarrow.ArrowException, csv.Error) as fault:
        raise DataError(
            "the file cannot be read to its end",
            where=path,
            # Some texts continue with an excerpt of the file, which must not be shown.
            got=first_line(fault).partition("\\n")[0].rstrip(),
            expected="a whole file of the format in its name; a .json file is one array of objects",
            remedy="if the file is damaged or incomplete, write or download it again; rename a file with one "
            "object per line to .jsonl; save text of another encoding as UTF-8",
        ) from fault


def numbered_records(
    values: Iterable[tuple[int, Any]], path: str, folders: Sequence[Path] = ()
) -> Iterator[RawRecord]:
    """Yield numbered values as records; a ValueError in place of a value becomes a bad record."""
    names = tuple(dict.fromkeys(map(str, folders)))
    for number, value in values:
        origin = Origin(path, number, names)
        if isinstance(value, Mapping):
            yield value, origin
        elif isinstance(value, ValueError):
            yield BadRecord("unparsable", origin, str(value)), origin
        else:
            detail = f"a {type(value).__name__} instead of an object"
            yield BadRecord("unparsable", origin, detail), origin


def dataset_rows(dataset: Any) -> Iterator[Any]:
    """Yield the rows of a `datasets.Dataset`, or of its stream, as they are stored.

    An image that the dataset has as the path of a file becomes its bytes.
    """
    from datasets.table import embed_table_storage  # noqa: PLC0415  (slow)

    form = getattr(dataset, "format", None)  # a stream has no format
    if form and form["type"] == "custom":  # a transform of the user's
        return map(_with_given_arguments, dataset)
    # As stored: to decode images needs packages, and decoded JSON would get the nulls of a table.
    columns = {"columns": form["columns"]} if form else {}
    tables = dataset.with_format("arrow", **columns).iter(_BATCH_RECORDS)
    return _table_rows(map(embed_table_storage, tables))


def _table_rows(tables: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows of Arrow tables: JSON parsed, labels as words, tool arguments without added nulls."""
    for table in tables:
        try:
            features = parse_json((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError):
            features = None
        parsers = _parsers(table.schema, features)
        for row in map(_with_given_arguments, table.to_pylist()):
            try:
                yield _parsed(row, parsers) if parsers else row
            except ValueError as fault:
                yield ValueError(f"JSON in a column: {fault}")


def _with_given_arguments(value: Any) -> Any:
    """Return a table's value without the nulls that the table adds to the arguments of tool calls."""
    if isinstance(value, Mapping):
        # An `input` without a name is no call but a part of the prompt.
        names = ARGUMENTS if "name" in value else ARGUMENTS[:2]
        return {
            name: without_nulls(item) if name in names else _with_given_arguments(item)
            for name, item in value.items()
        }
    return list(map(_with_given_arguments, value)) if isinstance(value, list) else value


def store_image(content: bytes, folder: Path) -> str:
    """Write the file of an image into `folder`, once; return its path there."""
    image = folder / "images" / hashlib.blake2b(content, digest_size=16).hexdigest()
    if not image.exists():
        with staged_file(image) as temporary:
            temporary.write_bytes(content)
    return f"images/{image.name}"


def write_records(records: Iterable[Any], folder: Path, name: str) -> Path:
    """Write records in memory to a .jsonl in `folder`, named by its content; return its path.

    They are a list, or a `datasets.Dataset`.
    Images of Pillow, and files as bytes, are written once each to `folder`/images. `name`: the argument's
    name, for errors. Raises ConfigError: no records, or one is not of JSON's types.
    """
    lines = list[str]()
    rows = records if isinstance(records, list) else dataset_rows(records)
    for record in rows:
        try:
            lines.append(json.dumps(record, default=lambda value: store_image(as_file(value), folder)) + "\n")
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                "a record cannot be written as JSON",
                where=f"{name}[{len(lines)}]",
                got=first_line(error),
                remedy="convert its values, or leave out fields that no format reads",
            ) from error
    if not lines:
        raise ConfigError("there are no records", where=name, got="0", remedy="give at least one")
    text = "".join(lines)
    file = folder / f"records-{text_digest(text)[:16]}.jsonl"
    if not file.exists():
        write_text(file, text)
    return file


def _opened(file: Path) -> BinaryIO:
    """Open a file and decompress it."""
    raw = pyarrow.input_stream(file, compression=_COMPRESSIONS.get(file.suffix))
    least = 8 * MAX_RECORD_BYTES
    if file_kind(file) == ".json":  # of which all records are in memory together
        least = MAX_RECORD_BYTES
    limit = max(least, _MAX_EXPANSION * file.stat().st_size)
    return io.BufferedReader(_Bounded(raw, limit), _BLOCK_BYTES)


class _Bounded(io.RawIOBase):
    """Reads a stream; raises ValueError after `limit` bytes."""

    def __init__(self, stream: Any, limit: int):
        self._stream = stream
        self._limit = limit
        self._left = limit

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return the number of bytes."""
        count: int = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise ValueError(f"the file expands to more than {self._limit:,} bytes")
        return count


def _lines(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    # Bytes, because lines of text would also end at Unicode separators.
    for number, line in enumerate(iter(partial(stream.readline, MAX_RECORD_BYTES + 1), b""), start=1):
        _check_size(len(line), number)
        if not line.isspace():
            try:
                value = parse_json(line)
            except ValueError as fault:
                value = fault
            yield number, value


def _check_size(size: int, line: int) -> None:
    if size > MAX_RECORD_BYTES:
        raise ValueError(f"line {line:,}: over {MAX_RECORD_BYTES:,} bytes without the end of a record")


def _table_lines(stream: BinaryIO, path: str, separator: str) -> Iterator[tuple[int, Any]]:
    # Bytes that are not UTF-8 become lone surrogates, so that only their own record is bad.
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    # Since the last record.
    size = 0
    has_header = False

    def lines() -> Iterator[str]:
        nonlocal size, has_header
        for number, line in enumerate(iter(partial(text.readline, MAX_RECORD_BYTES + 1), ""), start=1):
            if not has_header and line.strip():
                _check_header(line, path)
                has_header = True
            size += len(line)
            _check_size(size, number)
            yield line

    csv.field_size_limit(MAX_RECORD_BYTES)
    rows = csv.reader(lines(), delimiter=separator, strict=True)
    header = next(filter(None, rows), [])
    _check_columns(list(filter(str.strip, header)), path)
    # Excel writes columns without a name for cells that look empty; pandas has its index in the first one.
    header = [name if name.strip() else f"column {number}" for number, name in enumerate(header, start=1)]
    line = rows.line_num + 1
    for cells in rows:
        if len(cells) > len(header):
            yield line, ValueError(f"{len(cells)} cells for {len(header)} columns")
        elif not _is_utf8("".join(cells)):
            yield line, ValueError(NOT_UTF8)
        elif cells:
            yield line, dict(zip(header, cells, strict=False))
        if cells:
            size = 0
        line = rows.line_num + 1


def _check_header(header: str, path: str) -> None:
    """Check a table's header. Raises DataError: the header is not UTF-8."""
    if not _is_utf8(header):
        raise DataError(
            "the table is not in UTF-8",
            where=path,
            got="other bytes in its header",
            remedy="save it as UTF-8 (Excel: CSV UTF-8; from Windows: iconv -f CP1252 -t UTF-8 OLD > NEW)",
        )


def _is_utf8(text: str) -> bool:
    """Return whether a text was UTF-8; other bytes became lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_columns(names: Sequence[str], path: str) -> None:
    """Check that no two columns have one name. Raises DataError."""
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise DataError(
            "two columns have the same name",
            where=path,
            got=", ".join(map(shown_key, repeated)),
            remedy="rename or remove one of them",
        )


def _parquet_rows(file: Path, path: str) -> Iterator[Any]:
    # Without a buffer a whole column of a row group would be loaded at once.
    table = pyarrow.parquet.ParquetFile(file, buffer_size=_BLOCK_BYTES, pre_buffer=False)
    _check_columns(table.schema_arrow.names, path)
    groups = map(table.metadata.row_group, range(table.num_row_groups))
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    if largest > MAX_RECORD_BYTES:
        raise ValueError(f"records of {largest:,} bytes: over {MAX_RECORD_BYTES:,}")
    records = min(_BATCH_RECORDS, max(1, _MAX_BATCH_BYTES // 4 // max(largest, 1)))
    for batch in table.iter_batches(records):
        if batch.nbytes > _MAX_BATCH_BYTES:
            raise ValueError(f"{len(batch)} records expand to {batch.nbytes:,} bytes")
        yield from _table_rows([batch])


def _parsers(fields: Iterable[pyarrow.Field], features: Any) -> dict[str, Callable[[Any], Any]]:
    """Return what reads the values of Arrow fields, by name, for those that store something else.

    `features`: what `datasets` says of the fields; strangers may have written anything there.
    """
    described = features if isinstance(features, Mapping) else {}
    pairs = ((field.name, _parser(field, described.get(field.name))) for field in fields)
    return {name: parse for name, parse in pairs if parse is not None}


def _parser(field: pyarrow.Field, feature: Any) -> Callable[[Any], Any] | None:
    kind = field.type
    described = feature if isinstance(feature, Mapping) else {}
    # JSON as text: so `datasets` stores values of mixed types. A type that pyarrow does not know is read as
    # its storage type; the field names it: "arrow.json", "google:sqlType:json".
    name = getattr(kind, "extension_name", "") or (field.metadata or {}).get(_EXTENSION, b"").decode()
    if name.endswith("json"):
        return lambda text: None if text is None else parse_json(text)
    # The number of a class says nothing: `class_encode_column` sorts names, so that "correct" is 0.
    if described.get("_type") == "ClassLabel" and isinstance(described.get("names"), list):
        names = dict(enumerate(described["names"]))
        return lambda value: names.get(value) if isinstance(value, int) else value
    if pyarrow.types.is_struct(kind):
        inside = _parsers(map(kind.field, range(kind.num_fields)), described)
        return partial(_parsed, parsers=inside) if inside else None
    if kind.num_fields == 1 and not pyarrow.types.is_map(kind):  # all kinds of lists
        # Before version 4 `datasets` described a list by a list.
        item = feature[0] if isinstance(feature, list) and feature else described.get("feature")
        parse = _parser(kind.field(0), item)
        return parse and (lambda items: items and list(map(parse, items)))
    return None


def _parsed(fields: Any, parsers: Mapping[str, Callable[[Any], Any]]) -> Any:
    """Return an object, or None, with the values of its fields read. Raises ValueError: one is no JSON."""
    if not fields:
        return fields
    return {name: parsers[name](value) if name in parsers else value for name, value in fields.items()}
