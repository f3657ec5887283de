"""What is written appears whole or not at all."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpo_dist.atomic import (
    collect_abandoned,
    is_temporary,
    recover_folder,
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


def replace_and_die(path: Path) -> None:
    """Replace the folder `path` in a process that ends with its first rename onto or away from it."""
    child = os.fork()
    if child == 0:
        rename = Path.rename

        def last_rename(self: Path, target: Path) -> Path:
            renamed = rename(self, target)
            os._exit(1)
            return renamed

        with staged_folder(path) as temporary:
            (temporary / "file").write_text("second")
            mock.patch.object(Path, "rename", last_rename).start()
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_while_a_folder_is_replaced_leaves_one(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without exchange, the folder is back when it is next written."""
    path = tmp_path / "fol[d]er"
    if not can_exchange:
        monkeypatch.setattr("dpo_dist.atomic._exchange", lambda *_: False)
    with staged_folder(path) as temporary:
        (temporary / "file").write_text("first")
    replace_and_die(path)
    assert path.exists() is can_exchange
    with pytest.raises(InterruptedError), staged_folder(path) as temporary:
        fail_after_writing(temporary / "file")
    assert (path / "file").read_text() == ("second" if can_exchange else "first")


def test_a_folder_that_is_there_is_not_replaced_by_one_that_was_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    with monkeypatch.context() as patched:
        patched.setattr("dpo_dist.atomic._exchange", lambda *_: False)
        with staged_folder(path) as temporary:
            (temporary / "file").write_text("first")
        replace_and_die(path)
    path.mkdir()
    recover_folder(path)
    assert names(path) == []


def test_temporary_names_are_known_and_never_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file"
    first, second = temporary_name(path), temporary_name(path)
    assert first != second
    assert first.parent == path.parent
    assert is_temporary(first)
    assert not is_temporary(path)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every fsync and rename in order, with the path or the new path."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def watch_fsync(descriptor: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def watch(move: Any) -> Any:
        def moved(path: Path, target: Path) -> Path:
            events.append(("rename", str(target)))
            return move(path, target)

        return moved

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch(rename))
    monkeypatch.setattr(Path, "replace", watch(replace))
    return events


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, on_disk: list[tuple[str, str]]
) -> None:
    with staged_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"content")
    assert on_disk == [
        ("fsync", str(temporary)),
        ("rename", str(tmp_path / "file")),
        ("fsync", str(tmp_path)),
    ]


def test_every_file_and_folder_is_on_disk_before_a_folder_has_its_name(
    tmp_path: Path, on_disk: list[tuple[str, str]]
) -> None:
    with staged_folder(tmp_path / "folder") as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "file").write_bytes(b"content")
    named = on_disk.index(("rename", str(tmp_path / "folder")))
    below = [temporary, temporary / "below", temporary / "below" / "file"]
    assert {("fsync", str(path)) for path in below} <= set(on_disk[:named])
    assert ("fsync", str(tmp_path)) in on_disk[named:]


def test_private_files_become_as_open_as_the_umask_lets_them(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with staged_folder(tmp_path / "folder") as temporary:
        descriptor, _ = tempfile.mkstemp(dir=temporary, prefix="private")
        os.close(descriptor)
    (private,) = (tmp_path / "folder").iterdir()
    assert private.stat().st_mode == plain.stat().st_mode


def test_only_what_dead_writers_left_is_collected(tmp_path: Path) -> None:
    """Not what is being written, and not the folder that a killed commit had moved aside."""
    living, file = temporary_name(tmp_path / "folder"), temporary_name(tmp_path / "file")
    dead = file.with_name(file.name.replace(f"-{os.getpid()}-", "-999999999-"))
    old, new = tmp_path / "old.tmp-0123456789ab", tmp_path / "new.tmp-0123456789ab"
    aside, superseded = tmp_path / "gone.tmp-replaced-01", tmp_path / "there.tmp-replaced-01"
    for folder in (living, aside, superseded, tmp_path / "there"):
        folder.mkdir()
    for one in (file, dead, old, new):
        one.write_bytes(b"")
    for one in (old, aside, superseded):
        os.utime(one, (0, 0))
    assert collect_abandoned(tmp_path) == sorted([dead, old, superseded])
    assert names(tmp_path) == sorted(path.name for path in (living, file, new, aside, tmp_path / "there"))
    assert collect_abandoned(tmp_path / "missing") == []


def test_what_a_hidden_process_may_be_writing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc shows a user only processes of their own (hidepid)."""

    def deny(process: int, _signal: int) -> None:
        raise PermissionError(process)

    new, old = temporary_name(tmp_path / "new"), temporary_name(tmp_path / "old")
    for one in (new, old):
        one.write_bytes(b"")
    os.utime(old, (0, 0))
    monkeypatch.setattr("dpo_dist.atomic._started", lambda _process: -1)
    monkeypatch.setattr(os, "kill", deny)
    assert collect_abandoned(tmp_path) == [old]
