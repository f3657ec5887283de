"""Damaged and unusual files give an error or counted bad records."""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_dist.data.formats import read_records
from dpo_dist.data.read import Meter
from dpo_dist.data.records import BadRecord
from dpo_dist.foundation.errors import DataError
from tests.support.records import TEXT, outcomes

LINE = json.dumps(TEXT).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


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


def test_a_parquet_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([TEXT] * 1000), file)
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[4:40] = bytes(36)
    for broken in (content[:-100], damaged):
        file.write_bytes(broken)
        with pytest.raises(DataError, match="cannot be read"):
            read(file)


def test_a_bad_line_does_not_affect_its_neighbours(tmp_path: Path) -> None:
    bad = [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a": ' * 2000 + b"1" + b"}" * 2000,
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
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([LINE, *(line for one in bad for line in (one, LINE))]) + b"\n")
    found = list(read_records(str(file)))
    assert [isinstance(record, BadRecord) for record in found] == [False, *([True, False] * len(bad))]
    reasons = [record.reason for record in found if isinstance(record, BadRecord)]
    assert reasons[:4] == ["unparsable", "unparsable", "unparsable", "invalid_unicode"]
    assert reasons[-3:] == ["invalid_scores"] * 3


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"[" + LINE + end for end in (b",", b",]", b"", b"] {}", b", {]")),
        LINE.replace(b"good", b"secret\xff").join([b"[", b"]"]),
    ],
)
def test_a_malformed_array_is_one_error_without_its_text(tmp_path: Path, damaged: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read to its end") as raised:
        read(file)
    assert "secret" not in str(raised.value)


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


@pytest.mark.parametrize("content", [b'{"a": 1}\n{"a": 2}', b"", b"x" * 10])
def test_json_without_an_array_is_explained(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match="not an array"):
        read_records(str(file))


def test_the_share_that_was_read_grows_to_one(tmp_path: Path) -> None:
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
        meter = Meter()
        shares = [meter.share or 0.0 for _ in read_records(str(file), meter)]
        assert shares == sorted(shares)
        assert 0.3 < shares[len(rows) // 2] < 0.75, (file.name, shares[len(rows) // 2])
        assert shares[-1] > 0.98
