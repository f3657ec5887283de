"""The first records of a source refuse it only if the others cannot be better."""

import json
from pathlib import Path

import pytest

from dpo_dist.config.data import DataConfig, OnBadRecord, SourceConfig
from dpo_dist.data.formats import check_first_formats
from dpo_dist.foundation.errors import DataError

GOOD = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
NO_SIDE = json.dumps({"prompt": "a", "chosen": "b", "rejected": None}) + "\n"
OTHER = json.dumps({"x": "a"}) + "\n"


def check(text: str, folder: Path, bad: OnBadRecord = OnBadRecord.drop) -> None:
    (folder / "a.jsonl").write_text(text)
    check_first_formats(SourceConfig(path=str(folder / "a.jsonl")), DataConfig(on_bad_record=bad))


@pytest.mark.parametrize("bad", [NO_SIDE, "{\n", NO_SIDE + "{\n"])
def test_sorted_data_may_begin_with_records_that_are_dropped(bad: str, tmp_path: Path) -> None:
    check(bad * 100 + GOOD * 10_000, tmp_path)


@pytest.mark.parametrize("bad", [NO_SIDE, "{\n"])
def test_many_bad_records_are_an_error(bad: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the first 16384 records"):
        check(bad * 16_385 + GOOD, tmp_path)
    with pytest.raises(DataError, match="no record can be used"):
        check(bad * 100, tmp_path)


def test_another_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the first 16384 records"):
        check(OTHER * 16_385, tmp_path)


def test_with_error_only_the_first_records_are_read(tmp_path: Path) -> None:
    check(GOOD * 65 + OTHER, tmp_path, OnBadRecord.error)
    with pytest.raises(DataError):
        check(GOOD * 60 + OTHER, tmp_path, OnBadRecord.error)
