"""Files that are changed in place are found; deleted and replaced ones stay readable."""

import os
from pathlib import Path

import pytest

from dpo_dist.data.dataset import MappedFiles
from dpo_dist.foundation.errors import DataError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.bin" for number in range(100)]
    for path in paths:
        path.write_bytes(b"0123")
        os.utime(path, (1, 1))
    return paths


def is_original(path: Path) -> bool:
    return path.read_bytes() == b"0123"


def check_all(mapped: MappedFiles) -> None:
    for _ in range(2):
        mapped.check()


@pytest.mark.parametrize("at", [0, 99])
@pytest.mark.parametrize("content", [b"4567", b"0", b"01234"])
def test_a_file_that_is_changed_in_place_is_an_error(files: list[Path], at: int, content: bytes) -> None:
    mapped = MappedFiles(files, is_original)
    check_all(mapped)
    files[at].write_bytes(content)
    with pytest.raises(DataError) as caught:
        check_all(mapped)
    assert caught.value.where == str(files[at])
    assert caught.value.got.startswith(f"{len(content)} bytes, written at 20")
    assert caught.value.expected.startswith("4 bytes, written at 1970-01-01")


def test_a_file_that_is_only_touched_is_no_error(files: list[Path]) -> None:
    mapped = MappedFiles(files, is_original)
    files[3].touch()
    check_all(mapped)
    mapped._is_intact = lambda path: pytest.fail(f"{path} is read again")
    check_all(mapped)


def test_files_that_are_deleted_or_replaced_are_no_error(files: list[Path]) -> None:
    mapped = MappedFiles(files, is_original)
    files[0].unlink()
    other = files[1].with_suffix(".new")
    other.write_bytes(b"other")
    other.replace(files[1])
    check_all(mapped)
    MappedFiles([], is_original).check()
    MappedFiles([files[0]], is_original).check()  # not there: nothing to compare with
