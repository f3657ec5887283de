"""A frame of pandas or polars is a Dataset of its rows, which `api.train` takes as records in memory."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dpo_dist.data.read.files import write_records

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = [
    {"prompt": "a", "chosen": TURNS, "score": 1.5, "label": True},
    {"prompt": "b", "chosen": TURNS[:1], "score": None, "label": False},
]


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_a_frame_is_its_rows(package: str, tmp_path: Path) -> None:
    module: Any = pytest.importorskip(package)
    table = getattr(datasets.Dataset, f"from_{package}")(module.DataFrame(ROWS))
    lines = write_records(table, tmp_path, "data.train").read_text().splitlines()
    assert list(map(json.loads, lines)) == ROWS
    assert write_records(ROWS, tmp_path, "data.train").read_text().splitlines() == lines
