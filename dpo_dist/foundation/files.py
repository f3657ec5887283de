"""Files: atomic writes (law L4), content digests, locks."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.foundation.errors import ConfigError, DpoDistError, first_line
from dpo_dist.foundation.text import without_secrets

_TEMPORARY = ".tmp-"
_REPLACED = "replaced-"
# Exactly the names that this module makes: a user's file with a similar name must not be deleted.
_TEMPORARY_SUFFIX = re.compile(r"\.tmp-(replaced-)?[0-9a-f]{12}")
_CREATED_SECONDS = 1
_SAMPLE_BYTES = 4096
_SAMPLES = 16
_ESCAPED = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
# Python can only read the umask by setting it: done at import, before a thread writes files.
_UMASK = os.umask(0o022)
os.umask(_UMASK)

log = logging.getLogger(__name__)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path`; a reader sees the old file or the new one, never a part."""
    with staged_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON, as `write_text` does; numbers that are not finite become null.

    Secrets in texts are hidden, as on the screen.
    """
    write_text(path, json.dumps(without_secrets(for_json(content)), indent=1) + "\n")


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON; line ends inside texts are escaped, also U+0085 and U+2028."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_ESCAPED) + "\n"


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per row to `path`, from `staged_file`; return the number of rows."""
    number = 0
    with path.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows, start=1):  # noqa: B007  (the last number is the result)
            stream.write(json_line(row))
    return number


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, a line each, as `read_fields`; a missing file yields none."""
    if path.exists():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield _object(line, f"{path}:{number}")


def read_fields(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run. Raises ConfigError if it is missing or has none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(str(path), first_line(error)) from None
    return _object(content, str(path))


def own_table(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file of this package."""
    table: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return table


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _unreadable(where, first_line(error)) from None
    if not isinstance(content, dict):
        raise _unreadable(where, "no JSON object")
    return content


def _unreadable(where: str, fault: str) -> ConfigError:
    return ConfigError(
        "this file of a run cannot be read",
        where=where,
        got=fault,
        expected="JSON as a run writes it",
        remedy="restore the file, or delete it: pages leave out what it tells",
    )


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; it becomes `path` on exit, and is removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.touch()
        with _hold_lock(temporary):
            yield temporary
            sync(temporary)
            temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes of a safetensors file before its tensors, which follow in this order without gaps.

    `tensors`: the format's name of the dtype, such as `BF16`, and the shape of each. The library's own writer
    copies all values, and gives no digest of what it writes.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start = end
        end += math.prod(shape) * int(dtype.lstrip("BFIU")) // 8
        header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment of the first tensor
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def staged_folder(path: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Yield an empty temporary folder; it becomes `path` on exit, and is removed on an error.

    Raises:
        FileExistsError: on exit `path` is a folder with files, and `replaces` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    with temporary_folder(path) as temporary:
        yield temporary
        commit_folder(temporary, path, replaces=replaces)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is removed on exit."""
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        with _hold_lock(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit_folder(temporary: Path, path: Path, *, replaces: bool = True, is_synced: bool = False) -> None:
    """Sync every file below `temporary` and rename it to `path`; an older `path` is deleted afterwards.

    `is_synced`: the writers of the files have synced them, and only folders are left.

    A crash between the two renames leaves both folders under temporary names; `recover_folder` repairs that.

    Raises:
        FileExistsError: `path` is a folder with files, and `replaces` is false.
    """
    for below in sorted(temporary.rglob("*")):
        if not is_synced or below.is_dir():
            sync(below)
    sync(temporary)
    replaced = []
    while not _rename(temporary, path):
        if not replaces:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        aside = path.with_name(f"{path.name}{_TEMPORARY}{_REPLACED}{uuid.uuid4().hex[:12]}")
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            path.rename(aside)
            replaced.append(aside)
    sync(path.parent)
    for former in replaced:
        if former.is_symlink():
            former.unlink()  # what it names stays
        else:
            shutil.rmtree(former, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Restore `path` if it is missing and a killed `commit_folder` had moved it aside."""
    if not path.exists():
        for aside in sorted(path.parent.glob(f"{glob.escape(path.name)}{_TEMPORARY}{_REPLACED}*")):
            with contextlib.suppress(FileNotFoundError):  # another process has restored or deleted it
                _rename(aside, path)


def _rename(temporary: Path, path: Path) -> bool:
    """Rename a folder to `path`; return False if `path` is a folder with files, or a link."""
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not path.is_symlink():
            raise
        return False
    return True


def temporary_name(path: Path) -> Path:
    """Return a unique path beside `path`."""
    return path.with_name(f"{path.name}{_TEMPORARY}{uuid.uuid4().hex[:12]}")


def is_temporary(path: Path) -> bool:
    """Return whether `path` is being written, or was left by a write that never finished."""
    return _TEMPORARY in path.name


def final_name(temporary: Path) -> Path:
    """Return the path that a temporary file or folder would have got."""
    return temporary.with_name(temporary.name.partition(_TEMPORARY)[0])


@contextlib.contextmanager
def _hold_lock(path: Path) -> Iterator[None]:
    """Lock a temporary file or folder until the writer ends or dies, where the file system has locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove the temporary files and folders of dead writers in `folder`; return the removed paths.

    A writer is dead if nobody holds its lock. A folder that was moved aside stays if it is the only copy.
    """
    removed = []
    for path in sorted(folder.glob(f"*{_TEMPORARY}*")):
        left = _TEMPORARY_SUFFIX.fullmatch(path.name, path.name.find(_TEMPORARY))
        if left is None or (left[1] and not final_name(path).exists()):
            continue
        with contextlib.suppress(OSError):  # locked, or removed by another process
            last_change = max(below.lstat().st_mtime for below in (path, *path.rglob("*")))
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(descriptor)
            if time.time() > last_change + _CREATED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


def sync(path: Path) -> None:
    """Flush a file's bytes or a folder's entries to disk."""
    if path.is_file():
        path.chmod(0o666 & ~_UMASK)  # some writers create private files
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_digest(files: Iterable[Path]) -> str:
    """Return the blake2b digest (32 hex digits) of the bytes of `files`, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Return the blake2b digest (32 hex digits) of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_identity(file: Path) -> str:
    """Return a text that changes with a file's content: path, metadata and a digest of a few sampled blocks.

    The change time (ctime) is included because copying over a file can preserve its modification time. The
    samples distinguish files of equal metadata, such as two read-only images mounted at one path.
    """
    path = file.resolve()
    samples = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        status = path.stat()  # after opening: only then a network file system asks its server
        for number in range(_SAMPLES):
            stream.seek(max(status.st_size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            samples.update(stream.read(_SAMPLE_BYTES))
    times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
    return f"{path}|{status.st_dev}|{status.st_size}|{status.st_ino}|{times}|{samples.hexdigest()}"


MEMO_FOLDER = "file_digests"
"""Folder of cached digests, in the data cache and in the reference store."""


def remembered_digest(file: Path, memo: Path | None) -> str:
    """Return the `content_digest` of one file; read it only if its `file_identity` has changed.

    `memo` is the folder with the cached digests; None: no cache.
    """
    identity = file_identity(file)
    digest = recall(memo, identity)
    if digest is None:
        digest = content_digest([file])
        if file_identity(file) != identity:
            raise ConfigError(
                "a file changes while it is read",
                where=str(file),
                remedy="start again when the file is complete",
            )
        remember(memo, identity, digest)
    return digest


def recall(memo: Path | None, identity: str) -> str | None:
    """Return the text cached for `identity`; None if there is none."""
    if memo is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads(_entry(memo, identity).read_bytes())["digest"])
    return None


def remember(memo: Path | None, identity: str, digest: str) -> None:
    """Cache a digest, or another short text, that depends on `identity` alone."""
    if memo is None:
        return
    try:
        remove_abandoned(memo)
        write_text(_entry(memo, identity), json.dumps({"file": identity, "digest": digest}, indent=1))
    except OSError as error:
        log.warning("a digest cannot be cached and is computed at every start: %s", error)


def _entry(memo: Path, identity: str) -> Path:
    # One file per identity: concurrent jobs never write the same file with different content.
    return memo / f"{text_digest(identity)}.json"


def for_json(value: Any) -> Any:
    """Return `value` for JSON: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(for_json, value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def locked(
    path: Path, owner: str, remedy: str = "wait until it ends, or set another run.dir", waits: bool = False
) -> Iterator[int]:
    """Open or create a file for appending and lock it until the context ends; yield its descriptor.

    `owner` completes the message "another process ..." of the error if another process has the lock, unless
    this one `waits`. A file system without locks does not notice a second process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(f"another process {owner}", where=str(path), remedy=remedy) from None
        except OSError:
            pass
        yield file.fileno()


def check_readable(path: Path, where: str, error: type[DpoDistError] = ConfigError) -> None:
    """Raise `error` if this user may not read a file or a folder, or not enter a folder above it."""
    absolute = path.absolute()
    for each in (*reversed(absolute.parents), absolute):
        mode = os.X_OK if each.is_dir() else os.R_OK
        mode |= os.R_OK if each == absolute else 0
        if each.exists() and not os.access(each, mode):
            raise error(
                f"this user may not read the {'folder' if each.is_dir() else 'file'}",
                where=where,
                got=f"{each}, as user {os.getuid()}",
                remedy="let its owner allow it (chmod -R a+rX FOLDER), or copy the files",
            )


def similar_path(path: Path) -> Path | None:
    """Return the file or folder beside a path that does not exist whose name is most like it, if any."""
    is_typed = path.parent.is_dir() and not os.path.lexists(path)
    names = [other.name for other in path.parent.iterdir()] if is_typed else []
    return next(map(path.with_name, get_close_matches(path.name, names, 1)), None)
