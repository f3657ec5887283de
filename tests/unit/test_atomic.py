"""Files and folders appear whole or not at all."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpo_dist.foundation.files import (
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


def test_text_is_utf8_and_missing_folders_are_created(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "folder" / "file", "naïve")
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == b"na\xc3\xafve"
    assert names(tmp_path / "new" / "folder") == ["file"]


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
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


def test_a_folder_replaces_all_files_of_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for generation in ("first", "second"):
        with staged_folder(path) as temporary:
            (temporary / generation).write_text(generation)
    assert names(path) == ["second"]
    assert names(tmp_path) == ["folder"]


def test_keep_if_keeps_the_folder_of_another_process(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for generation in ("first", "second"):
        with staged_folder(path, keep_if=lambda there: (there / "file").is_file()) as temporary:
            (temporary / "file").write_text(generation)
    assert (path / "file").read_text() == "first"
    assert names(tmp_path) == ["folder"]


def test_concurrent_writers_of_one_folder_all_succeed(tmp_path: Path) -> None:
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
    """Replace the folder `path` in a process that dies after its first rename of it."""
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
    """Without exchange of names, the next write restores the folder first."""
    path = tmp_path / "fol[d]er"
    if not can_exchange:
        monkeypatch.setattr("dpo_dist.foundation.files._exchange", lambda *_: False)
    with staged_folder(path) as temporary:
        (temporary / "file").write_text("first")
    replace_and_die(path)
    assert path.exists() is can_exchange
    with pytest.raises(InterruptedError), staged_folder(path) as temporary:
        fail_after_writing(temporary / "file")
    assert (path / "file").read_text() == ("second" if can_exchange else "first")


def test_recovery_does_not_replace_an_existing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    with monkeypatch.context() as patched:
        patched.setattr("dpo_dist.foundation.files._exchange", lambda *_: False)
        with staged_folder(path) as temporary:
            (temporary / "file").write_text("first")
        replace_and_die(path)
    path.mkdir()
    recover_folder(path)
    assert names(path) == []


def test_temporary_names_are_recognised_and_unique(tmp_path: Path) -> None:
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


def test_a_file_is_synced_before_its_rename_and_the_folder_after_it(
    tmp_path: Path, on_disk: list[tuple[str, str]]
) -> None:
    with staged_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"content")
    assert on_disk == [
        ("fsync", str(temporary)),
        ("rename", str(tmp_path / "file")),
        ("fsync", str(tmp_path)),
    ]


def test_everything_in_a_folder_is_synced_before_its_rename(
    tmp_path: Path, on_disk: list[tuple[str, str]]
) -> None:
    with staged_folder(tmp_path / "folder") as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "file").write_bytes(b"content")
    named = on_disk.index(("rename", str(tmp_path / "folder")))
    below = [temporary, temporary / "below", temporary / "below" / "file"]
    assert {("fsync", str(path)) for path in below} <= set(on_disk[:named])
    assert ("fsync", str(tmp_path)) in on_disk[named:]


def test_private_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with staged_folder(tmp_path / "folder") as temporary:
        descriptor, _ = tempfile.mkstemp(dir=temporary, prefix="private")
        os.close(descriptor)
    (private,) = (tmp_path / "folder").iterdir()
    assert private.stat().st_mode == plain.stat().st_mode


def test_only_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    """Files being written stay, and so does a folder that a killed commit had moved aside."""
    living, file = temporary_name(tmp_path / "folder"), temporary_name(tmp_path / "file")
    dead = file.with_name(file.name.replace(f"-{os.getpid()}-", "-999999999-"))
    old, new = tmp_path / "old.tmp-0123456789ab", tmp_path / "new.tmp-0123456789ab"
    aside, superseded = (tmp_path / f"{name}.tmp-replaced-0123456789ab" for name in ("gone", "there"))
    foreign = ("my.tmp-1", "a.tmp-x-1-2-3", "b.tmp-replaced-", "c.tmp-0123456789ab.txt")
    of_users = [tmp_path / name for name in foreign]
    for folder in (living, aside, superseded, tmp_path / "there"):
        folder.mkdir()
    for one in (file, dead, old, new, *of_users):
        one.write_bytes(b"")
    for one in (old, aside, superseded, *of_users):
        os.utime(one, (0, 0))
    assert collect_abandoned(tmp_path) == sorted([dead, old, superseded])
    kept = (living, file, new, aside, tmp_path / "there", *of_users)
    assert names(tmp_path) == sorted(path.name for path in kept)
    assert collect_abandoned(tmp_path / "missing") == []


def test_files_of_a_hidden_process_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid, /proc shows users only their own processes."""

    def deny(process: int, _signal: int) -> None:
        raise PermissionError(process)

    new, old = temporary_name(tmp_path / "new"), temporary_name(tmp_path / "old")
    for one in (new, old):
        one.write_bytes(b"")
    os.utime(old, (0, 0))
    monkeypatch.setattr("dpo_dist.foundation.files._started", lambda _process: -1)
    monkeypatch.setattr(os, "kill", deny)
    assert collect_abandoned(tmp_path) == [old]


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder"

    def write() -> None:
        with staged_folder(path, replaces=False) as temporary:
            (temporary / "file").write_text("new")
            path.mkdir()
            (path / "own").write_text("of another process")

    with pytest.raises(FileExistsError):
        write()
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["folder", "folder/own"]
