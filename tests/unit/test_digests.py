"""A cached digest is that of the bytes on disk now."""

import os
from pathlib import Path

import pytest

from dpo_dist.foundation.files import content_digest, remember_digest, remembered_digest


@pytest.mark.parametrize("offset", [0, 1_000_000, 3_999_999])
def test_a_changed_byte_is_detected_with_the_old_modification_time(tmp_path: Path, offset: int) -> None:
    file, memo = tmp_path / "file", tmp_path / "memo"
    file.write_bytes(bytes(4_000_000))
    before, times = remembered_digest(file, memo), file.stat()
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\x01")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remembered_digest(file, memo) == content_digest([file]) != before


def test_files_of_equal_metadata_differ_by_their_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as two read-only images mounted at one path."""
    file, memo = tmp_path / "file", tmp_path / "memo"
    file.write_bytes(b"a" * 100_000)
    status, stat = file.stat(), Path.stat
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda path, **how: status if path == file else stat(path, **how))
        before = remembered_digest(file, memo)
        file.write_bytes(b"b" * 100_000)
        assert remembered_digest(file, memo) == content_digest([file]) != before


def test_a_digest_of_the_writer_is_used_until_the_file_changes(tmp_path: Path) -> None:
    file, memo = tmp_path / "file", tmp_path / "memo"
    file.write_bytes(b"content")
    remember_digest(file, memo, "written")
    assert remembered_digest(file, memo) == "written"
    file.write_bytes(b"other content")
    assert remembered_digest(file, memo) == content_digest([file])
