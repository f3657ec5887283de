"""Files: atomic writes (law L4), content digests, guarded reads, locks."""

import contextlib
import ctypes
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
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dpo_dist.foundation.errors import ConfigError

_TEMPORARY = ".tmp-"
_ABANDONED_SECONDS = 24 * 3600
_REPLACED = "replaced-"
# Names of this module only: users have files of similar names.
_LEFT = re.compile(r"\.tmp-(?:(replaced)-|([0-9a-f]{8})-(\d+)-(-?\d+)-)?[0-9a-f]{12}")

# Of linux/fcntl.h and linux/fs.h.
_WORKING_FOLDER = -100
_EXCHANGE = 2


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`; a reader sees the old file or the new one, never a part."""
    with staged_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


def open_in_place(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file to write to it where it is; a link to another file is refused.

    In a folder of others a link may name any file of this user.

    Args:
        path: of the file.
        mode: of `open`; so are `options`.

    Raises:
        OSError: it is a link, or cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            if Path(name).is_char_device():  # /dev/null
                return os.open(name, flags)
            raise OSError(errno.ELOOP, "it is a link; delete it, and the file is made here", name) from None

    return open(path, mode, opener=opener, **options)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; it becomes `path` on exit, and is removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(
    path: Path, keep_if: Callable[[Path], bool] | None = None, *, replaces: bool = True
) -> Iterator[Path]:
    """Yield an empty temporary folder; it becomes `path` on exit, and is removed on an error.

    Args:
        path: the final name.
        keep_if: called with `path` on exit; True keeps the folder that another process has committed there.
        replaces: whether an existing folder is replaced.

    Raises:
        FileExistsError: `path` exists on exit, has files, and is not replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    with temporary_folder(path) as temporary:
        yield temporary
        if keep_if is None or not keep_if(path):
            commit_folder(temporary, path, replaces=replaces)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is removed on exit."""
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit_folder(temporary: Path, path: Path, *, replaces: bool = True) -> None:
    """Sync every file below `temporary` and rename it to `path`; an older `path` is deleted afterwards.

    Raises:
        FileExistsError: there is an older `path` with files, and it is not to be replaced.

    If the file system can exchange two names, `path` exists at every moment. If not (NFS, Lustre), a crash
    between two renames leaves both folders under temporary names, until `recover_folder`.
    """
    for below in sorted(temporary.rglob("*")):
        sync(below)
    sync(temporary)
    replaced = []
    while not _take(temporary, path):
        if not replaces:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if _exchange(temporary, path):
            replaced.append(temporary)
            break
        aside = path.with_name(f"{path.name}{_TEMPORARY}{_REPLACED}{uuid.uuid4().hex[:12]}")
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            path.rename(aside)
            replaced.append(aside)
    sync(path.parent)
    for folder in replaced:
        shutil.rmtree(folder, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Restore `path` if it is missing and a killed `commit_folder` had moved it aside."""
    if not path.exists():
        for aside in sorted(path.parent.glob(f"{glob.escape(path.name)}{_TEMPORARY}{_REPLACED}*")):
            _take(aside, path)


def _take(temporary: Path, path: Path) -> bool:
    """Rename a folder; return False if another one has the name."""
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; return False if the system cannot do that."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux; glibc 2.28 or newer, or musl
    if rename is None:
        return False
    failed: int = rename(_WORKING_FOLDER, os.fsencode(first), _WORKING_FOLDER, os.fsencode(second), _EXCHANGE)
    return not failed


def temporary_name(path: Path) -> Path:
    """Return a unique path beside `path` that identifies the writing process."""
    unique = uuid.uuid4().hex[:12]
    return path.with_name(
        f"{path.name}{_TEMPORARY}{_PROCESSES}-{os.getpid()}-{_started(os.getpid())}-{unique}"
    )


def is_temporary(path: Path) -> bool:
    """Return whether `path` is being written, or was left by a write that never finished."""
    return _TEMPORARY in path.name


def final_name(temporary: Path) -> Path:
    """Return the name that a temporary file or folder was to get."""
    return temporary.with_name(temporary.name.partition(_TEMPORARY)[0])


def collect_abandoned(folder: Path) -> list[Path]:
    """Remove the temporary files and folders of dead writers in `folder`; return the removed paths.

    A writer is dead if no process has its id and start time. Writers on another machine, in another
    container, or of another user whose processes are hidden cannot be looked up: they count as dead if they
    have written nothing for a day.
    """
    removed = []
    for path in sorted(folder.glob(f"*{_TEMPORARY}*")):
        with contextlib.suppress(OSError):  # another process has removed it
            if _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


def _is_abandoned(path: Path) -> bool:
    left = _LEFT.fullmatch(path.name, path.name.find(_TEMPORARY))
    if left is None:
        return False
    replaced, processes, process, started = left.groups()
    if replaced and not final_name(path).exists():
        return False  # the only copy of that folder
    if processes == _PROCESSES and not _is_hidden(int(process)):
        return _started(int(process)) != int(started)
    written = max(below.lstat().st_mtime for below in (path, *path.rglob("*")))
    return time.time() - written > _ABANDONED_SECONDS


def _process_namespace() -> str:
    """Return a digest of the boot and the container in which process ids are unique; random if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return uuid.uuid4().hex[:8]
    return hashlib.blake2b(f"{boot}{namespace}".encode(), digest_size=4).hexdigest()


def _started(process: int) -> int:
    """Return the start time of a process in clock ticks; -1 if it does not exist or is a zombie."""
    try:
        state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return -1 if state == "Z" else int(numbers[18])
    except (OSError, ValueError, IndexError):
        return -1


def _is_hidden(process: int) -> bool:
    """Return whether the process belongs to another user and /proc hides it (mount option hidepid)."""
    if _started(process) >= 0:
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        pass
    return False


_PROCESSES = _process_namespace()


def _umask() -> int:
    """Return the umask; `os.umask` would change it for all threads."""
    found = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 8) if found else 0o022


def sync(path: Path) -> None:
    """Flush a file's bytes or a folder's entries to disk."""
    if path.is_file():
        # Some writers create private files; shared files get the permissions of the umask.
        path.chmod(0o666 & ~_umask())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_MOST_BYTES = 2**30
"""More than the metrics of a million steps, or the manifest of a source with a million files."""


def read_small(file: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """Return the content of a file.

    Args:
        file: any path.
        most_bytes: a whole number of MiB.

    Raises:
        OSError: it cannot be read, is larger than `most_bytes`, or is a device or a pipe.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a pipe, opening could wait
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is a device or a pipe", str(file))
        if status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {most_bytes >> 20:,} MiB", str(file))
        return stream.read()


log = logging.getLogger(__name__)

_BLOCK_BYTES = 2**22
_SAMPLE_BYTES = 4096
_SAMPLES = 16


def content_digest(files: Iterable[Path]) -> str:
    """Return the blake2b digest (32 hex digits) of the bytes of `files`, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
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
        status = path.stat()  # after opening: a client of a network file system then asks the server
        for number in range(_SAMPLES):
            stream.seek(max(status.st_size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            samples.update(stream.read(_SAMPLE_BYTES))
    times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
    return f"{path}|{status.st_dev}|{status.st_size}|{status.st_ino}|{times}|{samples.hexdigest()}"


def remembered_digest(file: Path, memo: Path | None) -> str:
    """Return the `content_digest` of one file; read it only if its `file_identity` has changed.

    Args:
        file: any file.
        memo: the folder with the cached digests; None: no cache.

    Raises:
        ConfigError: the file cannot be read, or changes while it is read.
    """
    try:
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
    except OSError as error:
        raise ConfigError(
            "a file cannot be read",
            where=str(file),
            got=str(error),
            remedy="check the path and its permissions",
        ) from error
    return digest


def remember_digest(file: Path, memo: Path, digest: str) -> None:
    """Cache a digest that was computed while the file was written."""
    remember(memo, file_identity(file), digest)


def recall(memo: Path | None, identity: str) -> str | None:
    """Return the text cached for `identity`; None if it is absent or damaged."""
    if memo is None or not (entry := _entry(memo, identity)).is_file():
        return None
    try:
        content = json.loads(read_small(entry))
        digest = str(content["digest"])
        if content["check"] == text_digest(identity + digest):
            return digest
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    log.warning("%s is damaged; its digest is computed again", entry)
    return None


def remember(memo: Path | None, identity: str, digest: str) -> None:
    """Cache a digest, or another short text, that depends on `identity` alone."""
    if memo is None:
        return
    content = {"file": identity, "digest": digest, "check": text_digest(identity + digest)}
    try:
        collect_abandoned(memo)
        write_text(_entry(memo, identity), json.dumps(content, indent=1))
    except OSError as error:
        log.warning("a digest cannot be cached and is computed at every start: %s", error)


def _entry(memo: Path, identity: str) -> Path:
    # One file per identity: concurrent jobs never write the same file with different content.
    return memo / f"{text_digest(identity)}.json"


def plain(value: Any) -> Any:
    """Return `value` for JSON: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def is_absent_offline(kind: str, name: str) -> bool:
    """Return whether the Hub is switched off (HF_HUB_OFFLINE) and its cache has nothing of a repository.

    Args:
        kind: `model` or `dataset`.
        name: of the repository.
    """
    from huggingface_hub import constants  # noqa: PLC0415  (a local source needs no Hub)

    if not constants.HF_HUB_OFFLINE:
        return False
    snapshots = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    return not any(snapshots.glob("*"))


@contextlib.contextmanager
def locked(path: Path, owner: str, remedy: str) -> Iterator[int]:
    """Open or create a file for appending and lock it until the context ends; yield its descriptor.

    On a file system without locks, a second process is not noticed.

    Args:
        path: of the file.
        owner: the other process, as the subject of the error.
        remedy: of the error.

    Raises:
        ConfigError: another process has locked it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process {owner}", where=str(path), remedy=remedy) from None
        except OSError:
            pass
        yield descriptor
    finally:
        os.close(descriptor)
