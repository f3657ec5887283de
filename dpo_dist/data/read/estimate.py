"""About how many records a source has, without reading it whole."""

import contextlib
from pathlib import Path

import pyarrow
import pyarrow.parquet

from dpo_dist.config.schema import SourceConfig
from dpo_dist.data.read.columns import is_saved
from dpo_dist.data.read.sources import local_files

_SAMPLES = 16
_SAMPLE_BYTES = 2**18


def expected_records(source: SourceConfig) -> int | None:
    """Return the number of records by the metadata of Parquet files and a sample of lines of .jsonl files.

    None: a file is of another kind, is compressed, or is not on this machine.
    """
    files = local_files(source)
    if not files or is_saved(Path(source.path).expanduser()):
        return None
    numbers = [_records(file) for file in files]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return None
    return sum(known) if source.limit is None else min(sum(known), source.limit)


def _records(file: Path) -> int | None:
    with contextlib.suppress(OSError, pyarrow.ArrowException):  # reading the records names the fault
        if file.suffix == ".parquet":
            return int(pyarrow.parquet.read_metadata(file).num_rows)
        if file.suffix == ".jsonl":
            return _lines(file)
    return None


def _lines(file: Path) -> int:
    """Return the number of lines: exact for a small file, else as many as samples of the file let expect."""
    size, lines, read = file.stat().st_size, 0, 0
    is_small = size <= _SAMPLES * _SAMPLE_BYTES
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(
                number * _SAMPLE_BYTES if is_small else (size - _SAMPLE_BYTES) * number // (_SAMPLES - 1)
            )
            block = stream.read(_SAMPLE_BYTES)
            lines, read = lines + block.count(b"\n"), read + len(block)
    return round(lines * size / read) if read else 0
