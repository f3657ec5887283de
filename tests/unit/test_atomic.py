"""What is written appears whole or not at all."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_dist.atomic import (
    is_temporary,
    staged_file,
    staged_folder,
    temporary_name,
    write_bytes,
    write_text,
)


def fail_after_writing(path: Path) -> None:
    path.write_bytes(b"ha")
    raise InterruptedError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_utf8_below_folders_that_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "folder" / "file", "naïve")
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == b"na\xc3\xafve"
    assert names(tmp_path / "new" / "folder") == ["file"]


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(InterruptedError), staged_file(path) as temporary:
        fail_after_writing(temporary)
    assert path.read_bytes() == b"old"
    with staged_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_with_all_its_files_or_not(tmp_path: Path) -> None:
    path = tmp_path / "made" / "folder"
    with pytest.raises(InterruptedError), staged_folder(path) as temporary:
        fail_after_writing(temporary / "part")
    assert names(tmp_path / "made") == []
    with staged_folder(path) as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "file").write_bytes(b"whole")
        assert not path.exists()
    assert (path / "below" / "file").read_bytes() == b"whole"
    assert names(tmp_path / "made") == ["folder"]


def test_a_folder_replaces_the_older_one_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for generation in ("first", "second"):
        with staged_folder(path) as temporary:
            (temporary / generation).write_text(generation)
    assert names(path) == ["second"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_stands_is_left_to_those_who_use_it(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for generation in ("first", "second"):
        with staged_folder(path, stands=lambda there: (there / "file").is_file()) as temporary:
            (temporary / "file").write_text(generation)
    assert (path / "file").read_text() == "first"
    assert names(tmp_path) == ["folder"]


def test_many_writers_of_one_folder_all_end_well(tmp_path: Path) -> None:
    path = tmp_path / "folder"

    def write(number: int) -> None:
        with staged_folder(path) as temporary:
            for name in ("one", "two"):
                (temporary / name).write_text(str(number))

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(write, range(64)))
    assert (path / "one").read_text() == (path / "two").read_text()
    assert names(tmp_path) == ["folder"]


def test_temporary_names_are_known_and_never_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file"
    first, second = temporary_name(path), temporary_name(path)
    assert first != second
    assert first.parent == path.parent
    assert is_temporary(first)
    assert not is_temporary(path)
