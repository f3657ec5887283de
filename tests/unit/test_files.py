"""Files and folders appear whole or not at all; a cached digest is that of the bytes on disk now."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import (
    content_digest,
    read_fields,
    read_lines,
    recover_folder,
    remembered_digest,
    remove_abandoned,
    staged_file,
    staged_folder,
    temporary_name,
    write_text,
)


def fail_after_writing(path: Path) -> None:
    path.write_bytes(b"ha")
    raise InterruptedError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, name: str = "file", text: str = "") -> None:
    with staged_folder(path) as temporary:
        (temporary / name).write_text(text)


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_text(path, "naïve")
    assert path.read_bytes() == b"na\xc3\xafve"
    with pytest.raises(InterruptedError), staged_file(path) as temporary:
        fail_after_writing(temporary)
    with staged_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"na\xc3\xafve"
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "null", "\xff"])
def test_a_file_that_is_missing_or_no_object_is_named(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    if content is not None:
        file.write_bytes(b'{"whole": 1}\n' + content.encode("latin-1") + b"\n")
        rows = read_lines(file)
        assert next(rows) == {"whole": 1}
        with pytest.raises(ConfigError, match="cannot be read") as raised:
            next(rows)
        assert raised.value.where == f"{file}:2"
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        read_fields(file)
    assert raised.value.where == str(file)


def test_a_folder_appears_with_all_its_files_or_not_and_replaces_all_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "made" / "folder"
    with pytest.raises(InterruptedError), staged_folder(path) as temporary:
        fail_after_writing(temporary / "part")
    assert names(tmp_path / "made") == []
    with staged_folder(path) as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "file").write_bytes(b"whole")
        assert not path.exists()
    assert (path / "below" / "file").read_bytes() == b"whole"
    write_folder(path, "second")
    assert (names(path), names(path.parent)) == (["second"], ["folder"])


def test_the_folder_of_another_process_is_never_replaced_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder(path, text="first")
    with pytest.raises(FileExistsError), staged_folder(path, replaces=False) as temporary:
        (temporary / "file").write_text("third")
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


def test_a_folder_whose_replacement_was_killed_is_restored_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "fol[d]er"
    aside = path.with_name(f"{path.name}.tmp-replaced-0123456789ab")
    write_folder(aside, text="first")
    with pytest.raises(InterruptedError), staged_folder(path) as temporary:
        fail_after_writing(temporary / "file")
    assert (path / "file").read_text() == "first"
    path.rename(aside)
    path.mkdir()
    recover_folder(path)
    assert names(path) == [], "an existing folder is not replaced"


def test_everything_is_synced_before_its_rename_and_the_folder_above_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, Path]] = []

    def watch(place: Any, name: str, path_of: Callable[..., Path]) -> None:
        original = getattr(place, name)

        def watched(*arguments: Any) -> Any:
            events.append((name, path_of(*arguments)))
            return original(*arguments)

        monkeypatch.setattr(place, name, watched)

    watch(os, "fsync", lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink())
    watch(Path, "rename", lambda _, target: target)
    watch(Path, "replace", lambda _, target: target)
    with staged_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"content")
    assert events == [("fsync", temporary), ("replace", tmp_path / "file"), ("fsync", tmp_path)]
    with staged_folder(tmp_path / "folder") as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "file").write_bytes(b"content")
    named = events.index(("rename", tmp_path / "folder"))
    below = [temporary, temporary / "below", temporary / "below" / "file"]
    assert {("fsync", path) for path in below} <= set(events[:named])
    assert ("fsync", tmp_path) in events[named:]


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
    dead, new = temporary_name(tmp_path / "dead"), temporary_name(tmp_path / "new")
    aside, superseded = (tmp_path / f"{name}.tmp-replaced-0123456789ab" for name in ("gone", "there"))
    of_users = [tmp_path / name for name in ("my.tmp-1", "b.tmp-replaced-", "c.tmp-0123456789ab.txt")]
    for folder in (aside, superseded, tmp_path / "there"):
        folder.mkdir()
    for one in (dead, new, *of_users):
        one.write_bytes(b"")
    with staged_file(tmp_path / "file") as file, staged_folder(tmp_path / "folder") as living:
        for one in (dead, aside, superseded, *of_users, file, living):
            os.utime(one, (0, 0))
        assert remove_abandoned(tmp_path) == sorted([dead, superseded])
        kept = (living, file, new, aside, tmp_path / "there", *of_users)
        assert names(tmp_path) == sorted(path.name for path in kept)
    assert remove_abandoned(tmp_path / "missing") == []


def test_a_changed_file_is_detected_by_its_times_or_else_by_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, memo = tmp_path / "file", tmp_path / "memo"
    file.write_bytes(bytes(4_000_000))
    before, status = remembered_digest(file, memo), file.stat()
    with file.open("r+b") as stream:
        stream.seek(1_000_000)  # between two samples
        stream.write(b"\x01")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert remembered_digest(file, memo) == content_digest([file]) != before
    # Such as two read-only images mounted at one path.
    before, status, stat = content_digest([file]), file.stat(), Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: status if path == file else stat(path, **how))
    file.write_bytes(b"b" * 4_000_000)
    assert remembered_digest(file, memo) == content_digest([file]) != before
