"""Hostile and huge files give an error or counted bad records, within bounded memory."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_dist.data import read as byte_stream
from dpo_dist.data import read as read_file
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord
from dpo_dist.foundation.errors import DataError
from tests.support.records import TEXT, outcomes

LINE = json.dumps(TEXT).encode()
HUGE_BYTES = 2**28

# Reads each file with 150 MiB more than the imports take, and prints the outcome of each.
READ_WITH_LITTLE_MEMORY = """
import resource, sys
import pyarrow.parquet
from collections import Counter
from dpo_dist.data.formats import read_records
from dpo_dist.foundation.errors import DataError
warm = list(read_records(sys.argv[1]))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20,) * 2)
for path in sys.argv[2:]:
    counts = Counter()
    try:
        for record in read_records(path):
            counts[getattr(record, "reason", "good")] += 1
        print(dict(sorted(counts.items())))
    except DataError as error:
        print(error.args[0].splitlines()[0])
"""


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def sparse(file: Path, start: bytes, end: bytes) -> Path:
    """Write a file of 256 MiB of NUL bytes, which take no space on disk."""
    with file.open("wb") as stream:
        stream.write(start)
        stream.seek(HUGE_BYTES)
        stream.write(end)
    return file


def bomb(file: Path, pack: Callable[[bytes], bytes], start: bytes) -> Path:
    """Write a compressed file of 256 MiB."""
    zeros = pack(b"0" * 2**26)
    file.write_bytes(pack(start) + zeros * 4)
    return file


def long_parquet(file: Path) -> Path:
    """Write one row group of 200 MiB that has cells of 4 MiB and one of 32 MiB."""
    cell = b"x" * 2**22
    texts = [cell] * 42 + [cell * 8] + [b"good"]
    columns = {"prompt": ["q"] * len(texts), "chosen": texts, "rejected": ["bad"] * len(texts)}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, file, use_dictionary=False, write_batch_size=1)  # a page for each cell
    return file


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_memory_is_bounded_whatever_the_file(tmp_path: Path) -> None:
    first = tmp_path / "first.jsonl"
    first.write_bytes(LINE)
    array = tmp_path / "many.json"
    with array.open("wb") as stream:
        stream.write(b"[")
        for _ in range(2000):
            stream.write(LINE + b"," + b" " * 100_000)
        stream.write(LINE + b"]")
    expected = {
        sparse(tmp_path / "line.jsonl", LINE + b"\n", b"\n" + LINE): "{'good': 2, 'unparsable': 1}",
        sparse(tmp_path / "element.json", b"[" + LINE + b',{"prompt": "', b'"},' + LINE + b"]"): (
            "{'good': 2, 'unparsable': 1}"
        ),
        sparse(tmp_path / "line.csv", b"prompt,chosen,rejected\nq,a,b\n", b"\nq,a,b\n"): (
            "{'good': 2, 'unparsable': 1}"
        ),
        sparse(tmp_path / "cell.csv", b'prompt,chosen,rejected\nq,a,b\n"', b"\nq,a,b\n"): (
            "{'good': 2, 'unparsable': 1}"
        ),
        array: "{'good': 2001}",
        bomb(tmp_path / "line.jsonl.gz", gzip.compress, LINE + b"\n"): "the compressed file expands",
        bomb(tmp_path / "line.json.zst", zstd, b"[" + LINE): ("the compressed file expands"),
        bomb(tmp_path / "line.csv.zst", zstd, b"prompt\n"): ("the compressed file expands"),
        long_parquet(tmp_path / "cells.parquet"): "{'good': 43, 'unparsable': 1}",
    }
    # Arrow's own pool reserves addresses that it does not use.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, str(first), *map(str, expected)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for path, found, outcome in zip(expected, done.stdout.splitlines(), expected.values(), strict=True):
        assert found.startswith(outcome), (path.name, found)


def read(file: Path) -> list[tuple[int, str]]:
    return outcomes(read_records(str(file)))


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
def test_a_compressed_file_that_ends_early_is_an_error(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    content = pack(b"\n".join(LINE.replace(b"q", b"%d" % number) for number in range(2000)))
    file = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read to its end") as raised:
        read(file)
    assert str(file) in raised.value.where


def test_a_repeated_record_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_stream, "_UNCHECKED_BYTES", 10_000)
    file = tmp_path / "a.jsonl.gz"
    record = json.dumps(TEXT | {"prompt": " ".join(map(str, range(300)))}).encode() + b"\n"
    file.write_bytes(gzip.compress(record * 3000))
    assert len(read(file)) == 3000


def test_a_parquet_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([TEXT] * 1000), file)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(DataError, match="not Parquet"):
        read(file)
    damaged = bytearray(content)
    damaged[4:40] = bytes(36)
    file.write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read"):
        read(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_bad_record_does_not_affect_its_neighbours(tmp_path: Path, name: str) -> None:
    bad = [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a": ' * 200 + b"1" + b"}" * 200,
        LINE.replace(b"good", b"g\xffod"),
        LINE.replace(b"good", b"g\\ud800d"),
        LINE.replace(b'"good"', b"1e999"),
        LINE.replace(b'"good"', b"null"),
        LINE.replace(b'"good"', b"[[null], {}]"),
        LINE.replace(b'"q"', b"[null]"),
        LINE.replace(b'"good"', b"9" * 5000),
        b"null",
        b"NaN",
        b'{"prompt": "q", "prompt": "q", "chosen": "a", "rejected": "b"}',
        LINE[:-1] + b', "score_chosen": 1e999, "score_rejected": 0}',
        LINE[:-1] + b', "score_chosen": NaN, "score_rejected": 0}',
        LINE[:-1] + b', "score_chosen": ' + b"9" * 400 + b', "score_rejected": 0}',
    ]
    lines = [LINE, *(line for one in bad for line in (one, LINE))]
    file = tmp_path / name
    ends = (b"[", b"]") if name == "a.json" else (b"", b"\n")
    file.write_bytes(ends[0] + (b",\n" if name == "a.json" else b"\n").join(lines) + ends[1])
    found = list(read_records(str(file)))
    assert [isinstance(record, BadRecord) for record in found] == [False, *([True, False] * len(bad))]
    reasons = [record.reason for record in found if isinstance(record, BadRecord)]
    assert reasons[:4] == ["unparsable", "unparsable", "unparsable", "invalid_unicode"]
    assert reasons[-3:] == ["invalid_scores"] * 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_line_ends_marks_and_separators_are_no_damage(tmp_path: Path, name: str) -> None:
    text = "one\u2028two\x00three\u0085"
    file = tmp_path / name
    if name == "a.csv":
        content = f"prompt,chosen,rejected\r\nq,{text},bad\r\nq,{text},bad\r\n"
    else:
        row = json.dumps(TEXT | {"chosen": text}, ensure_ascii=False)
        content = f"[{row},\r\n{row}]\r\n" if name == "a.json" else f"{row}\r\n{row}\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    first, second = read_records(str(file))
    assert not isinstance(first, BadRecord)
    assert not isinstance(second, BadRecord)
    assert first.responses == second.responses == (text, "bad")


def test_a_line_of_a_million_characters_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(TEXT | {"chosen": "word " * 200_000}))
    assert read(file) == [(1, "")]


def test_an_array_in_another_file_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, got in ((b'{"a": 1}\n{"a": 2}', "an object"), (b"", "empty"), (b"x" * 10, "no array")):
        file.write_bytes(content)
        with pytest.raises(DataError, match="not an array") as raised:
            read_records(str(file))
        assert got in raised.value.got
    file.write_bytes(b"[" + LINE + b",")
    with pytest.raises(DataError, match="not JSON") as raised:
        read(file)
    assert "ends inside the array" in raised.value.got


def test_the_share_that_was_read_grows_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_file, "_PARQUET_BATCH_RECORDS", 64)
    generator = random.Random(0)
    rows = [TEXT | {"prompt": generator.randbytes(500).hex()} for _ in range(8000)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    csv = io.BytesIO(
        b"prompt,chosen,rejected\n" + b"".join(f'"{row["prompt"]}",a,b\n'.encode() for row in rows)
    )
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_bytes(csv.getvalue())
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in sorted(tmp_path.iterdir()):
        meter = byte_stream.Meter()
        shares = [meter.share or 0.0 for _ in read_records(str(file), meter)]
        assert shares == sorted(shares)
        assert 0.3 < shares[len(rows) // 2] < 0.75, (file.name, shares[len(rows) // 2])
        assert shares[-1] > 0.98
