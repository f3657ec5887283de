"""Read the records of a source: a file, a pattern, a folder, or a dataset on the Hugging Face Hub.

Files are JSON lines, JSON, CSV, TSV and Parquet.
"""

import codecs
import contextlib
import csv
import glob
import io
import itertools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeVar

import pyarrow
import pyarrow.parquet

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.read.columns import is_saved, resolved, with_columns
from dpo_dist.data.read.values import (
    NOT_UTF8,
    class_parsers,
    json_parsers,
    parse_json,
    with_parsed_json,
    without_nulls,
)
from dpo_dist.data.records import MAX_RECORD_BYTES, BadRecord, Origin, RawRecord, shown_key
from dpo_dist.foundation.errors import ConfigError, DataError, dead_link, first_line, in_one_line
from dpo_dist.foundation.files import remembered_digest, text_digest, write_text

T = TypeVar("T")

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_COMPRESSED_KINDS = (".jsonl", ".json", *_SEPARATORS)
_KINDS = (*_COMPRESSED_KINDS, ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK_BYTES = 2**20
_BATCH_RECORDS = 64
# For each line between records: reading many empty ones takes minutes.
_LINE_BYTES = 64
# More than this expansion is no text that was compressed.
_MAX_EXPANSION = 100
_ARGUMENTS = ("arguments", "parameters")
_SUFFIXES = (*_KINDS, *_COMPRESSIONS)
_GLOB = re.compile(r"[*?\[]")
_DATA_NAME = re.compile(
    r"\.(jsonl|json|csv|parquet|ndjson|jsonlines|tsv|arrow|feather)(\.(gz|zst|bz2|xz|zip|lz4|7z|br))?$",
    re.IGNORECASE,
)
# Files that describe a dataset beside its data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "config.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_NOT_FOUND = "neither a local file nor a dataset found on the Hugging Face Hub"


def raw_records(source: SourceConfig) -> Iterator[RawRecord]:
    """Return the first `limit` records of a `resolved` source, by its `reader` and `columns`."""
    files, local = local_files(source), Path(source.path).expanduser()
    names: Iterable[str] = map(str, files or ())
    if files is None:
        folder = _download(source)
        files = _data_files(folder, source)
        names = [f"{source.path}/{file.relative_to(folder)}" for file in files]
    elif files == [local]:
        names = [source.path]
    if is_saved(local):
        records = _saved_records(local, source)
    else:
        records = itertools.chain.from_iterable(map(read_file, files, names))
    return with_columns(itertools.islice(records, source.limit), source)


def check_has_evaluation_data(data: DataConfig, use: str, form: str = "with both responses") -> None:
    """Check that there is a source of evaluation data, to `use` ("compare models on"). Raises ConfigError."""
    if not data.eval_sources:
        raise ConfigError(
            f"there is no evaluation data to {use}",
            where="data.eval",
            got="no source",
            expected=f"held-out records, {form}",
            remedy="set 'data.eval=[held_out.jsonl]', or data.train and data.eval_share as in training",
        )


def local_files(source: SourceConfig) -> list[Path] | None:
    """Return the files of a local source; None for a dataset on the Hugging Face Hub.

    Raises DataError: the source does not exist, or has a file of a kind that cannot be read; ConfigError: a
    key has no effect on it.
    """
    path = source.path
    if "://" in path:
        raise DataError(
            "URLs cannot be read",
            where=path,
            expected="a local path, or the name of a dataset on the Hugging Face Hub",
            remedy="download the file and set its path; write a Hub dataset as organisation/name",
        )
    local = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or _is_like_a_file(local)
    if not (local.exists() or _GLOB.search(path) or looks_local):
        return None
    unused = {"revision"} if local.is_dir() else {"name", "data_dir", "revision", "split"}
    for key in sorted(unused | ({"name", "data_dir"} if is_saved(local) else set())):
        if (value := getattr(source, key)) is not None:
            raise ConfigError(
                f"{key} has no effect on this source",
                where=f"{key} of {path}",
                got=value,
                expected="null",
                remedy=f"remove {key}: it is of Hub datasets" + (" and folders" * (key != "revision")),
            )
    if local.is_dir():
        if is_saved(local):
            return sorted(below for below in local.rglob("*") if below.is_file())
        return _folder_files(local, source)
    if not local.is_file() and not _GLOB.search(path):
        raise _missing(local)
    files = [local] if local.is_file() else _globbed_files(str(local))
    for file in files:
        _check_kind(file, path)
    return files


def source_identity(source: SourceConfig, memo: Path | None = None) -> str:
    """Return a digest of a source's content: of its files, or the commit of a `pinned` Hub dataset.

    Digests of files are remembered in the folder `memo`. Raises DataError: the source does not exist.
    """
    files = local_files(source)
    if files is None:
        return f"hub commit {source.revision}, name {source.name}, data_dir {source.data_dir}"
    digests = [remembered_digest(file, memo) for file in files]
    if Path(source.path).expanduser().is_file():
        return digests[0]
    # Kind, split and origins follow from names; the location of the folder does not matter.
    root = root_of(source.path).expanduser()
    names = [os.path.relpath(file, root) for file in files]
    return text_digest("\n".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True)))


def _check_kind(file: Path, path: str) -> None:
    if file_kind(file) is None:
        raise DataError(
            "this kind of file cannot be read",
            where=path,
            got=file.suffix or "a name without an extension",
            expected=f"{', '.join(_KINDS)}; {', '.join(_COMPRESSED_KINDS)} also as .gz or .zst",
            remedy="save a table as .csv (Excel: CSV UTF-8)"
            if file.suffix in (".xlsx", ".xls", ".ods")
            else "convert, unpack or rename the file; one with a JSON object per line is a .jsonl",
        )


def _is_like_a_file(path: Path) -> bool:
    """Return whether a name ends as data files do, or as any file does whose folder exists: `table.xlsx`."""
    if path.suffix in _SUFFIXES or _DATA_NAME.search(path.name):
        return True
    return re.fullmatch(r"\.[A-Za-z]{2,7}", path.suffix) is not None and path.parent.is_dir()


def _missing(file: Path) -> DataError:
    is_typed = file.parent.is_dir() and not os.path.lexists(file)
    beside = [other.name for other in file.parent.iterdir()] if is_typed else []
    similar = get_close_matches(file.name, beside, 1)
    return DataError(
        "the path is neither a file nor a folder" if file.exists() else "the file does not exist",
        where=str(file),
        got=dead_link(file) or ("" if file.parent.is_dir() else f"no folder {file.parent}"),
        remedy=f"did you mean {file.with_name(similar[0])}?" if similar else "check the path of the source",
    )


# Patterns and folders.


def root_of(path: str) -> Path:
    """Return the folder to which names of a source's files are relative; of a pattern the part before it."""
    return Path(*itertools.takewhile(lambda part: not _GLOB.search(part), Path(path).parts))


def _globbed_files(pattern: str) -> list[Path]:
    """Return the files that match, sorted by path; hidden ones only if the pattern names the dot."""
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207  (a pathlib pattern matches hidden files)
    # A file that `**` finds on several ways, behind links to folders, is read once.
    ways = {file.parent.resolve() / file.name: file for file in sorted(map(Path, names), reverse=True)}
    files = sorted(file for file in ways.values() if file.is_file())
    if not files:
        raise DataError(
            "no file matches the pattern",
            where=pattern,
            remedy="check the pattern; `**` matches folders at any depth",
        )
    return files


def _folder_files(folder: Path, source: SourceConfig) -> list[Path]:
    """Return the data files of a folder's split. Raises DataError: none, or others would not be read."""
    below = (file for file in folder.rglob("*") if file.is_file() and _DATA_NAME.search(file.name))
    visible = (file for file in below if "/." not in f"/{file.relative_to(folder)}")
    files = _data_files(folder, source, [file for file in visible if file.name not in _DESCRIPTIONS])
    shards = Counter(shard.groups() for file in files if (shard := _SHARD.match(str(file))))
    for (name, total), present in shards.items():
        if present != int(total):
            raise DataError(
                "shards of the source are missing",
                where=name,
                got=f"{present} of {int(total)}",
                remedy="copy or download the folder again, or select the shards that exist by a pattern",
            )
    return files


def _data_files(folder: Path, source: SourceConfig, every: Sequence[Path] = ()) -> list[Path]:
    """Return the files of a split, by their names or the folder's card, as `datasets` finds them.

    None of `every` may be outside of all splits, unless the source selects a part of the folder.
    """
    from datasets import load_dataset_builder  # noqa: PLC0415  # slow to import

    with _as_data_error(source):
        builder = load_dataset_builder(str(folder), source.name, data_dir=source.data_dir)
    root, splits = folder.resolve(), dict[str, list[Path]]()
    for split, names in (builder.config.data_files or {}).items():
        files = sorted(Path(os.path.normpath(name)) for name in names)
        _check_below(root, files, source, "the card of the dataset")
        splits[str(split)] = [folder / file.relative_to(root) for file in files]
    known = set(itertools.chain(*splits.values()))
    if not (source.name or source.data_dir) and (unread := [file for file in every if file not in known]):
        raise DataError(
            "files of the folder are in no split, or of another kind",
            where=str(folder),
            got=", ".join(str(file.relative_to(folder)) for file in unread[:5]),
            expected="files of one kind, with a split in every name or in none",
            remedy="convert or rename them, or select files by a pattern, for example path/*.jsonl",
        )
    files = _of_split(source, splits)
    for file in files:
        _check_kind(file, str(file))
    return files


def _check_below(root: Path, files: Iterable[Path], source: SourceConfig, what: str) -> None:
    """Check that strangers, who write cards and other descriptions, name no files outside the folder."""
    if outside := [file for file in files if not file.is_relative_to(root)]:
        raise DataError(
            f"{what} names a file outside its folder",
            where=source.path,
            got=str(outside[0]),
            remedy="set path of the source to this file, if you want it to be read",
        )


def _of_split(source: SourceConfig, splits: Mapping[str, T]) -> T:
    split = source.split or "train"
    if split not in splits:
        raise DataError(
            "the source has no such split",
            where=source.path,
            got=f"{split}{'' if source.split else ' (the default)'}",
            expected=", ".join(sorted(splits)),
            remedy="set split of this source",
        )
    return splits[split]


def _saved_records(folder: Path, source: SourceConfig) -> Iterator[RawRecord]:
    """Return the records of a folder written by `Dataset.save_to_disk`."""
    from datasets import Dataset, load_from_disk  # noqa: PLC0415  # slow to import

    root = folder.resolve()
    with _as_data_error(source):
        names = [
            root / split
            for file in root.glob("dataset_dict.json")
            for split in parse_json(file.read_bytes())["splits"]
        ]
        states = [(file, parse_json(file.read_bytes())["_data_files"]) for file in root.rglob("state.json")]
    names += [file.parent / entry["filename"] for file, entries in states for entry in entries]
    _check_below(root, (Path(os.path.normpath(name)) for name in names), source, "the saved dataset")
    with _as_data_error(source):
        saved = load_from_disk(str(folder))
    splits = {"train": saved} if isinstance(saved, Dataset) else saved
    return _records(enumerate(_dataset_rows(_of_split(source, splits)), start=1), source.path)


def _dataset_rows(dataset: Any) -> Iterator[Any]:
    form = getattr(dataset, "format", None)  # a stream has none
    if form and form["type"] == "custom":  # a transform of the user's
        return map(_with_given_arguments, dataset)
    # As stored: decoded, images need packages, and nulls in JSON are like those of tables.
    columns = {"columns": form["columns"]} if form else {}
    return _table_rows(dataset.with_format("arrow", **columns).iter(_BATCH_RECORDS))


# The Hugging Face Hub.


def pinned(source: SourceConfig) -> SourceConfig:
    """Return the source that an entry of a dataset_info.json describes, or the source itself.

    A Hub dataset has its commit as `revision` (null: main); if the Hub cannot be reached, the one in its
    cache. Raises DataError: there is none, or no such dataset.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  # slow to import

    source = resolved(source)
    if local_files(source) is not None:
        return source
    with _as_data_error(source):
        commit = HfApi().resolve_revision(source.path, repo_type="dataset", revision=source.revision)
    return replace(source, revision=commit.resolved)


def _download(source: SourceConfig) -> Path:
    """Return the folder of a Hub dataset; files missing in the Hub's cache are downloaded."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import

    wanted = ["*.md", "*.yaml", f"{source.data_dir}/**"] if source.data_dir else None
    with _as_data_error(source):
        return Path(
            snapshot_download(
                source.path, repo_type="dataset", revision=source.revision, allow_patterns=wanted
            )
        )


@contextlib.contextmanager
def _as_data_error(source: SourceConfig) -> Iterator[None]:
    """Raise DataError for all errors of the Hub's libraries, which share no base class."""
    try:
        yield
    except Exception as fault:
        is_folder = Path(source.path).expanduser().is_dir()
        raise DataError(
            "the data of the folder cannot be found" if is_folder else _NOT_FOUND,
            where=source.path,
            got=in_one_line(fault),
            remedy="check path, name, data_dir, revision, split, the network, and access rights of a gated "
            "dataset; HF_HUB_OFFLINE=1 allows only datasets that were downloaded before",
        ) from fault


# Files.


def file_kind(file: Path) -> str | None:
    """Return a file's extension before the one of its compression; None if it cannot be read."""
    if file.suffix in _COMPRESSIONS:
        inner = Path(file.stem).suffix
        return inner if inner in _COMPRESSED_KINDS else None
    return file.suffix if file.suffix in _KINDS else None


def read_file(file: Path, path: str) -> Iterator[RawRecord]:
    """Yield the records of a file, or why they cannot be read, in its order; only a .json is read whole.

    Their origin is `path` with the 1-based line of their start, in .parquet and .json their number.
    Raises DataError: the file cannot be read.
    """
    try:
        match file_kind(file):
            case ".jsonl":
                values = _lines(_opened(file, path))
            case ".json":
                limit = max(MAX_RECORD_BYTES, _MAX_EXPANSION * file.stat().st_size)
                blocks = iter(partial(_opened(file, path).read, _BLOCK_BYTES), b"")
                content = b"".join(itertools.islice(blocks, limit // _BLOCK_BYTES + 2))
                if len(content) > limit:
                    raise ValueError(f"the file expands to more than {limit:,} bytes")
                elements = parse_json(content)
                if not isinstance(elements, list):
                    raise ValueError("the JSON file is not an array")
                values = enumerate(elements, start=1)
            case ".csv" | ".tsv" as kind:
                values = _table_lines(_opened(file, path), path, _SEPARATORS[kind])
            case _:
                values = enumerate(_parquet_rows(file), start=1)
        yield from _records(values, path)
    except (OSError, ValueError, pyarrow.ArrowException, csv.Error) as fault:
        raise DataError(
            "the file cannot be read to its end",
            where=path,
            # Some texts go on with an excerpt of the file, which is not shown.
            got=first_line(fault).partition("\\n")[0].rstrip(),
            expected="a whole file of the kind that its name says; a .json file is one array of objects",
            remedy="if the file is damaged or incomplete, write or download it again; rename a file with one "
            "object per line to .jsonl; save text of another encoding as UTF-8",
        ) from fault


def _records(values: Iterable[tuple[int, Any]], path: str) -> Iterator[RawRecord]:
    """Yield values with the number of their line as records; a ValueError says why there is none."""
    for number, value in values:
        origin = Origin(path, number)
        if isinstance(value, Mapping):
            yield value, origin
        elif isinstance(value, ValueError):
            yield BadRecord("unparsable", origin, str(value)), origin
        else:
            detail = f"a {type(value).__name__} instead of an object"
            yield BadRecord("unparsable", origin, detail), origin


def _table_rows(tables: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows of Arrow tables as they were: JSON parsed, labels as words, arguments as given."""
    for table in tables:
        parsers = json_parsers(table.schema) | class_parsers(table.schema)
        for row in map(_with_given_arguments, table.to_pylist()):
            try:
                yield with_parsed_json(row, parsers) if parsers else row
            except ValueError as fault:
                yield ValueError(f"JSON in a column: {fault}")


def _with_given_arguments(value: Any) -> Any:
    """Return a value of a table without the nulls with which it fills the arguments of tool calls."""
    if isinstance(value, Mapping):
        return {
            name: without_nulls(item) if name in _ARGUMENTS else _with_given_arguments(item)
            for name, item in value.items()
        }
    return [_with_given_arguments(item) for item in value] if isinstance(value, list) else value


def write_records(records: Iterable[Any], folder: Path, name: str) -> Path:
    """Write records in memory to a .jsonl of `folder` that is named by its content, and return its path.

    `name`: of the argument, for errors. Raises ConfigError: there are none, or one is not of JSON's types.
    """
    lines = list[str]()
    is_dataset = hasattr(records, "with_format") and hasattr(records, "iter")
    others = _dataset_rows(records) if is_dataset else map(_with_given_arguments, records)
    for record in records if isinstance(records, list) else others:
        try:
            lines.append(json.dumps(record) + "\n")
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


def _opened(file: Path, path: str) -> io.BufferedReader:
    """Open a file, uncompressed. Raises DataError: it is in UTF-16, with or without its mark."""
    raw = pyarrow.input_stream(file, compression=_COMPRESSIONS.get(file.suffix))
    stream = io.BufferedReader(raw, _BLOCK_BYTES)
    start = stream.peek(2)[:2]
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or start.count(0) == 1:
        raise DataError(
            "the file is in UTF-16, not in UTF-8",
            where=path,
            remedy="save it as UTF-8 (Excel: CSV UTF-8): iconv -f UTF-16 -t UTF-8 OLD > NEW",
        )
    return stream


def _lines(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    # Lines of bytes end at newlines only, not at Unicode separators.
    blank = 0
    for number, line in enumerate(iter(partial(stream.readline, MAX_RECORD_BYTES + 1), b""), start=1):
        blank = blank + len(line) + _LINE_BYTES if line.isspace() else 0
        _check_size(max(blank, len(line)), number)
        if not blank:
            try:
                value = parse_json(line)
            except ValueError as fault:
                value = fault
            yield number, value


def _check_size(size: int, line: int) -> None:
    if size > MAX_RECORD_BYTES:
        lines = MAX_RECORD_BYTES // _LINE_BYTES
        raise ValueError(
            f"line {line:,}: over {MAX_RECORD_BYTES:,} bytes, or {lines:,} lines, without the end of a record"
        )


def _table_lines(stream: BinaryIO, path: str, separator: str) -> Iterator[tuple[int, Any]]:
    # Bytes that are not UTF-8 become lone surrogates, so that only their own record is bad.
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    size, has_header = 0, False  # since the last record

    def lines() -> Iterator[str]:
        nonlocal size, has_header
        for number, line in enumerate(iter(partial(text.readline, MAX_RECORD_BYTES + 1), ""), start=1):
            if not has_header and line.strip():
                _check_header(line, path, separator)
                has_header = True
            size += len(line) + _LINE_BYTES
            _check_size(size, number)
            yield line

    csv.field_size_limit(MAX_RECORD_BYTES)
    rows = csv.reader(lines(), delimiter=separator, strict=True)
    header = next(filter(None, rows), [])
    _check_columns(header)
    line = rows.line_num + 1
    for cells in rows:
        if len(cells) > len(header):
            yield line, ValueError(f"{len(cells)} cells for {len(header)} columns")
        elif not _is_utf8("".join(cells)):
            yield line, ValueError(NOT_UTF8)
        elif cells:
            yield line, dict(zip(header, cells, strict=False))
        size = 0 if cells else size
        line = rows.line_num + 1


def _check_header(header: str, path: str, separator: str) -> None:
    """Check the first line of a table. Raises DataError: it is not UTF-8, or has another separator."""
    if not _is_utf8(header):
        raise DataError(
            "the table is not in UTF-8",
            where=path,
            got="other bytes in its header",
            remedy="save it as UTF-8 (Excel: CSV UTF-8; of Windows: iconv -f CP1252 -t UTF-8 OLD > NEW)",
        )
    other = next((other for other in "\t;|," if other in header), None)
    if other and separator not in header:
        kinds = {known: kind for kind, known in _SEPARATORS.items()}
        new = Path(path).with_name(f"{Path(path).name.partition('.')[0]}_commas.csv")
        read = (
            f"pandas.read_csv({json.dumps(path)}, sep={json.dumps(other)}, dtype=str, keep_default_na=False)"
        )
        code = shlex.quote(f"import pandas; {read}.to_csv({json.dumps(str(new))}, index=False)")
        write = f"python -c {code} writes commas; then read {new}"
        raise DataError(
            f"the columns of the table are not separated by {separator!r}",
            where=path,
            got=f"a header with {other!r}",
            expected=", ".join(f"{known!r} in a {kind}" for known, kind in kinds.items()),
            remedy=f"rename the file to {kinds[other]}" if other in kinds else write,
        )


def _is_utf8(text: str) -> bool:
    """Return whether a text has no bytes that are not UTF-8, as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_columns(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have the same name: {', '.join(map(shown_key, names))}")


def _parquet_rows(file: Path) -> Iterator[Any]:
    # Buffered: else a whole column of a row group is loaded at once.
    table = pyarrow.parquet.ParquetFile(file, buffer_size=_BLOCK_BYTES, pre_buffer=False)
    _check_columns(table.schema_arrow.names)
    yield from _table_rows(table.iter_batches(batch_size=_BATCH_RECORDS))


# Labels.

# Names of files and folders that say nothing without the folder above.
_USUAL_NAMES = frozenset({"data", "dev", "eval", "test", "train", "training", "val", "validation"})


def source_labels(sources: Sequence[SourceConfig]) -> list[str]:
    """Return a label for each source: its `label`, or its name, numbered where names are equal.

    Sources with the same `label` share it.
    """
    taken, labels = {source.label for source in sources}, list[str]()
    for source in sources:
        name = _name(source)
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        labels.append(source.label or next(name for name in names if name not in taken))
        taken.add(labels[-1])
    return labels


def _name(source: SourceConfig) -> str:
    """Return the name of a source's file, with subset, folder and split."""
    if source.name is not None and resolved(source) is not source:
        return _safe(source.name)
    file = PurePath(source.path)
    while file.suffix in _SUFFIXES:
        file = file.with_suffix("")
    parts = [*filter(None, map(_safe, file.parts))] or ["source"]
    shown = parts[-2:] if parts[-1] in _USUAL_NAMES else parts[-1:]
    options = [_safe(each) for each in (source.name, source.data_dir, source.split) if each]
    return "-".join(filter(None, [*shown, *options]))


def _safe(text: str) -> str:
    """Return `text` without characters that separate parts of a metric's name or of a path."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.")
