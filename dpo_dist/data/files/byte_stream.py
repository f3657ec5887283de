"""Open a data file as a stream of uncompressed bytes; the share of a source that has been read."""

import codecs
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from dpo_dist.errors import DataError

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
