"""Frames of pandas and polars are records in memory, as `api.train` takes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.read.files import write_records
from dpo_dist.foundation.errors import ConfigError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = [
    {"prompt": "a", "chosen": TURNS, "score": 1.5, "label": True},
    {"prompt": "b", "chosen": TURNS[:1], "score": None, "label": False},
]


@pytest.mark.parametrize("package", ["pandas", "polars", "pyarrow"])
def test_a_frame_is_its_rows(package: str, tmp_path: Path) -> None:
    module: Any = pytest.importorskip(package)
    frame = module.Table.from_pylist(ROWS) if package == "pyarrow" else module.DataFrame(ROWS)
    lines = write_records(frame, tmp_path, "data.train").read_text().splitlines()
    assert list(map(json.loads, lines)) == ROWS
    assert write_records(ROWS, tmp_path, "data.train").read_text().splitlines() == lines


def test_rows_that_are_left_of_a_frame_keep_their_fields(tmp_path: Path) -> None:
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    frame["kind"] = frame.prompt.astype("category")
    [line] = write_records(frame[frame.prompt == "b"], tmp_path, "data.train").read_text().splitlines()
    row = json.loads(line)
    assert {name: row[name] for name in ("prompt", "score", "kind")} == {
        "prompt": "b",
        "score": None,
        "kind": "b",
    }


def test_a_column_of_mixed_types_is_named(tmp_path: Path) -> None:
    frame = pytest.importorskip("pandas").DataFrame({"prompt": ["a", 3]})
    with pytest.raises(ConfigError) as raised:
        write_records(frame, tmp_path, "data.train")
    assert raised.value.where == "data.train"
    assert "list of records" in raised.value.remedy
