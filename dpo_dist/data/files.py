"""Rows of a local file, a saved folder or a hub data set, each with the line it stands on."""

import csv
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import pyarrow.parquet

from dpo_dist.data.records import BadRecord, Origin
from dpo_dist.digests import remembered_digest, text_digest
from dpo_dist.errors import ConfigError, DataError

Located: TypeAlias = tuple[Mapping[str, Any] | BadRecord, Origin]

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_MAX_CELL_CHARACTERS = 2**31 - 1
_PARQUET_BATCH_ROWS = 1024


def read_rows(path: str, split: str | None) -> Iterator[Located]:
    """Rows in the source's order, streamed except for a .json array.

    Args:
        path: local file, folder saved by `datasets`, or hub name.
        split: for a saved folder of several splits or a hub name (null: train); an error elsewhere.

    Returns:
        Each row or why it is none, and its origin: true 1-based line numbers for .jsonl and .csv (where the
        record starts), record numbers elsewhere.

    Raises:
        DataError: there is no such source, or it cannot be read.
        ConfigError: `split` given where it has no effect.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _located(_saved_rows(local, split), path)
    if not local.is_file():
        if _looks_local(path):
            raise _missing(local)
        return _located(_hub_rows(path, split), path)
    _refuse_split(path, split)
    match local.suffix:
        case ".jsonl":
            return _jsonl_rows(local, path)
        case ".json":
            return _located(_json_rows(local), path)
        case ".csv":
            return _csv_rows(local, path)
        case ".parquet":
            return _located(_parquet_rows(local), path)
    raise DataError(
        "this kind of file cannot be read",
        where=path,
        got=local.suffix or "a name without an ending",
        expected=", ".join(_SUFFIXES),
        remedy="convert or rename the file; a file with one JSON object per line ends in .jsonl",
    )


def _located(rows: Iterator[Any], path: str) -> Iterator[Located]:
    for number, row in enumerate(rows, start=1):
        yield _object(row, Origin(path, number))


def _object(row: Any, origin: Origin) -> Located:
    if isinstance(row, Mapping):
        return row, origin
    return BadRecord("unparsable", origin, f"a {type(row).__name__} where an object is expected"), origin


def _jsonl_rows(file: Path, path: str) -> Iterator[Located]:
    # Read as bytes: only "\n" ends a line, whatever Unicode separators the texts hold.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = Origin(path, number)
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as fault:
                yield BadRecord("unparsable", origin, _reason(fault)), origin
            else:
                yield _object(row, origin)


def _reason(fault: Exception) -> str:
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
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as fault:
        raise DataError(
            "the file is not JSON",
            where=str(file),
            got=_reason(fault),
            expected="one array of objects",
            remedy="a file with one object per line has to be named .jsonl",
        ) from fault
    if not isinstance(rows, list):
        raise DataError(
            "the file holds no array",
            where=str(file),
            got=f"a {type(rows).__name__}",
            expected="one array of objects",
        )
    return iter(rows)


def _csv_rows(file: Path, path: str) -> Iterator[Located]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with _open_csv(file) as text:
        try:
            header = next(csv.reader(text, strict=True), [])
        except csv.Error as fault:
            raise DataError("the first line is no CSV header", where=f"{path}:1", got=str(fault)) from fault
    if len(set(header)) < len(header):
        raise DataError(
            "two columns have the same name",
            where=f"{path}:1",
            got=", ".join(header),
            expected="a name of its own for each column",
        )
    return _csv_records(file, path, header)


def _csv_records(file: Path, path: str, header: list[str]) -> Iterator[Located]:
    with _open_csv(file) as text:
        # Strict, so that a quote that never closes is a bad record and not one giant cell.
        reader = csv.reader(text, strict=True)
        next(reader, None)
        while True:
            origin = Origin(path, reader.line_num + 1)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as fault:
                lines = reader.line_num - origin.line + 1
                yield BadRecord("unparsable", origin, f"{fault} ({lines} lines read)"), origin
                continue
            if len(cells) > len(header):
                yield BadRecord("unparsable", origin, f"{len(cells)} cells under {len(header)} names"), origin
            elif cells:
                yield dict(zip(header, cells, strict=False)), origin


def _open_csv(file: Path) -> TextIO:
    # What is not UTF-8 becomes a lone surrogate, which makes its record a bad one and no other.
    return file.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _parquet_rows(file: Path) -> Iterator[Any]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as fault:
        raise DataError("the file is not Parquet", where=str(file), got=str(fault)) from fault
    batches = table.iter_batches(batch_size=_PARQUET_BATCH_ROWS)
    return (row for batch in batches for row in batch.to_pylist())


def _saved_rows(folder: Path, split: str | None) -> Iterator[Any]:
    from datasets import Dataset, load_from_disk  # noqa: PLC0415  # slow to import, and only needed here

    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError) as fault:
        files = sorted(below.name for below in folder.iterdir() if below.suffix in _SUFFIXES)
        raise DataError(
            "the folder was not saved by datasets",
            where=str(folder),
            expected="what Dataset.save_to_disk writes",
            remedy=f"name one of its files: {', '.join(files[:5])}" if files else "",
        ) from fault
    if isinstance(saved, Dataset):
        _refuse_split(str(folder), split)
        return iter(saved)
    if (split or "train") not in saved:
        raise DataError(
            "the folder has no such split",
            where=str(folder),
            got=split or "train (the default)",
            expected=", ".join(map(str, saved)),
            remedy="set split of this source",
        )
    return iter(saved[split or "train"])


def _hub_rows(name: str, split: str | None) -> Iterator[Any]:
    from datasets import load_dataset  # noqa: PLC0415  # slow to import, and only needed here

    try:
        return iter(load_dataset(name, split=split or "train", streaming=True))
    except (OSError, ValueError) as fault:
        raise DataError(
            "neither a local file nor a data set that the hub gives",
            where=f"{name} (split {split or 'train'})",
            got=str(fault),
            remedy="check the name, the split, the network, and access rights of a gated data set",
        ) from fault


def _looks_local(path: str) -> bool:
    return path.endswith(_SUFFIXES) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _missing(file: Path) -> DataError:
    if not file.parent.is_dir():
        return DataError(
            "there is no such folder", where=str(file.parent), remedy="check the path of the source"
        )
    names = [below.name for below in file.parent.iterdir()]
    near = difflib.get_close_matches(file.name, names, n=3)
    return DataError(
        "there is no such file",
        where=str(file),
        remedy=f"did you mean {' or '.join(near)}?" if near else "check the path of the source",
    )


def _refuse_split(path: str, split: str | None) -> None:
    if split is not None:
        raise ConfigError(
            "a split has no effect on a source without splits",
            where=f"split of {path}",
            got=split,
            expected="null",
            remedy="remove split, or use limit to take the first records only",
        )


def source_files(path: str) -> list[Path]:
    """The local files of a source, in order; none of a hub name.

    Raises:
        DataError: there is no such source.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return [local]
    if local.is_dir():
        return sorted(below for below in local.rglob("*") if below.is_file())
    if _looks_local(path):
        raise _missing(local)
    return []


def source_identity(path: str, memo: Path | None) -> str:
    """What changes when the content of a source changes: a digest of its bytes and of how the names of its
    files end, or the hub's revision. Where it lies does not matter.

    Args:
        path: of the source.
        memo: where digests of files are remembered; None: nowhere, every file is read.

    Raises:
        DataError: there is no such source.
    """
    local = Path(path).expanduser()
    files = source_files(path)
    if files:
        names = [file.suffix if file == local else str(file.relative_to(local)) for file in files]
        digests = [remembered_digest(file, memo) for file in files]
        return text_digest(json.dumps(list(zip(names, digests, strict=True))))
    from huggingface_hub import dataset_info  # noqa: PLC0415  # only needed here

    try:
        return f"hub revision {path}@{dataset_info(path).sha}"
    except (OSError, ValueError) as fault:
        raise DataError(
            "neither a local file nor a data set that the hub gives",
            where=path,
            got=str(fault).splitlines()[0],
            remedy="check the name, the network, and access rights of a gated data set",
        ) from fault
