"""Sources are encoded once, whole or not at all."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpo_dist.data import encode as encode_module
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.encoded import build
from dpo_dist.encoded.build import Preparation
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.cache import encoded_folders
from tests.support.records import jsonl

CHUNK = 2
COUNT = 6
ROWS = [{"prompt": f"q {n}", "chosen": "right " * (n + 1), "rejected": "wrong"} for n in range(COUNT)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHUNK_RECORDS", CHUNK)


def preparation(folder: Path) -> Preparation:
    source = SourceConfig(jsonl(folder, *ROWS))
    return Preparation([source], DataConfig(cache=str(folder / "cache")), tiny.qwen(), "qwen")


def at_record(prompt: str, act: Any) -> Any:
    """Call `act` with the record of this prompt before it is encoded."""
    encode = encode_module.encode_pair

    def spy(record: Any, *rest: Any) -> Any:
        if record.prompt == prompt:
            act(record)
        return encode(record, *rest)

    return mock.patch.object(encode_module, "encode_pair", spy)


def test_data_that_change_meanwhile_are_not_committed(tmp_path: Path) -> None:
    one = preparation(tmp_path)
    with (
        at_record("q 3", lambda _: jsonl(tmp_path, *ROWS[:2])),
        pytest.raises(DataError, match="changed while they were read"),
    ):
        one.whole()
    assert encoded_folders(tmp_path) == []


def test_data_that_change_before_they_are_read_are_not_committed(tmp_path: Path) -> None:
    """Their name was computed at the start: another source may have been encoded first."""
    one = preparation(tmp_path)
    planned = one.plan()
    jsonl(tmp_path, *ROWS[:2])
    with (
        mock.patch.object(Preparation, "plan", return_value=planned),
        pytest.raises(DataError, match="changed while they were read"),
    ):
        one.whole()
    assert encoded_folders(tmp_path) == []


def test_an_error_of_a_record_names_its_place(tmp_path: Path) -> None:
    def fail(record: Any) -> None:
        raise DataError("no template", where=str(record.origin), got="a record", remedy="set one")

    one = preparation(tmp_path)
    with at_record("q 4", fail), pytest.raises(DataError, match="no template") as raised:
        one.whole()
    assert raised.value.where == f"{one.sources[0].path}:5"
    assert encoded_folders(tmp_path) == []


def test_a_source_is_encoded_once_and_again_if_its_file_is_damaged(tmp_path: Path) -> None:
    one = preparation(tmp_path)
    [made] = one.whole()
    with at_record("q 0", mock.Mock(side_effect=AssertionError)):
        assert one.whole() == (made,)
    content = made.file.read_bytes()
    made.file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert one.whole() == (made,)
    assert made.file.read_bytes() == content


def test_progress_counts_the_encoded_records(tmp_path: Path) -> None:
    shown = list[tuple[int, ...]]()
    progress = mock.Mock(return_value=contextlib.nullcontext(lambda *numbers: shown.append(numbers)))
    replace(preparation(tmp_path), progress=progress).whole()
    assert shown == [(done,) for done in range(CHUNK, COUNT + 1, CHUNK)]
