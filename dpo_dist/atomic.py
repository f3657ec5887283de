"""Whole or not at all: how everything that is read again gets written (law L4).

A file or folder appears under its final name only when its bytes are on disk: temporary name beside it,
fsync, rename, fsync of the parent.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_TEMPORARY = ".tmp-"
_OWNER_PARTS = 4
_ABANDONED_SECONDS = 24 * 3600
_REPLACED = "replaced-"

# Of linux/fcntl.h and linux/fs.h.
_WORKING_FOLDER = -100
_EXCHANGE = 2

_UMASK = os.umask(0)
os.umask(_UMASK)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    with staged_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on leaving without an error it becomes `path`, else it is removed."""
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
def staged_folder(path: Path, stands: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder; on leaving without an error it becomes `path`.

    Args:
        path: the final name; what is there is replaced.
        stands: whether what another process has committed there meanwhile is as good, and stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        if stands is None or not stands(path):
            commit_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit_folder(temporary: Path, path: Path) -> None:
    """Sync every file below `temporary` and rename it to `path`; an older `path` is deleted only then.

    Where the file system can exchange two names, `path` exists at every moment. Elsewhere (NFS, Lustre) a
    crash between two renames leaves both folders under temporary names, until `recover_folder`.
    """
    for below in sorted(temporary.rglob("*")):
        sync(below)
    sync(temporary)
    replaced = []
    while not _take(temporary, path):
        if _exchange(temporary, path):
            replaced.append(temporary)
            break
        aside = path.with_name(f"{path.name}{_TEMPORARY}{_REPLACED}{uuid.uuid4().hex[:12]}")
        with contextlib.suppress(FileNotFoundError):  # another process was first to move it
            path.rename(aside)
            replaced.append(aside)
    sync(path.parent)
    for folder in replaced:
        shutil.rmtree(folder, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Rename to `path`, where it is missing, the folder that a killed `commit_folder` had moved aside."""
    if not path.exists():
        for aside in sorted(path.parent.glob(f"{glob.escape(path.name)}{_TEMPORARY}{_REPLACED}*")):
            _take(aside, path)


def _take(temporary: Path, path: Path) -> bool:
    """Rename a folder; False if another one has the name."""
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux; glibc 2.28 or newer, or musl
    if rename is None:
        return False
    failed: int = rename(_WORKING_FOLDER, os.fsencode(first), _WORKING_FOLDER, os.fsencode(second), _EXCHANGE)
    return not failed


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses, and by which its writer is known."""
    unique = uuid.uuid4().hex[:12]
    return path.with_name(
        f"{path.name}{_TEMPORARY}{_PROCESSES}-{os.getpid()}-{_started(os.getpid())}-{unique}"
    )


def is_temporary(path: Path) -> bool:
    """Whether `path` is left over from a write that never finished, or is being written."""
    return _TEMPORARY in path.name


def collect_abandoned(folder: Path) -> list[Path]:
    """Remove what dead writers have left in `folder`; returns what was removed.

    A writer is dead if no process of its number and start time is there any more. Of one on another machine,
    in another container, or of another user whose processes are hidden, that cannot be asked: it counts as
    dead if it has written nothing for a day.
    """
    removed = []
    for path in sorted(folder.glob(f"*{_TEMPORARY}*")):
        with contextlib.suppress(OSError):  # another process was first
            if _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


def _is_abandoned(path: Path) -> bool:
    name, _, end = path.name.partition(_TEMPORARY)
    if end.startswith(_REPLACED) and not path.with_name(name).exists():
        return False  # all that there is of that folder
    owner = end.split("-")
    if len(owner) == _OWNER_PARTS and owner[0] == _PROCESSES and not _is_hidden(int(owner[1])):
        return _started(int(owner[1])) != int(owner[2])
    written = max(below.lstat().st_mtime for below in (path, *path.rglob("*")))
    return time.time() - written > _ABANDONED_SECONDS


def _process_namespace() -> str:
    """Names the boot and the container within which process numbers mean something; random if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return uuid.uuid4().hex[:8]
    return hashlib.blake2b(f"{boot}{namespace}".encode(), digest_size=4).hexdigest()


def _started(process: int) -> int:
    """When a process started, in the kernel's clock ticks; -1 if there is none, or only its exit code."""
    try:
        state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return -1 if state == "Z" else int(numbers[18])
    except (OSError, ValueError, IndexError):
        return -1


def _is_hidden(process: int) -> bool:
    """Whether there is a process of another user that /proc does not show (its mount option hidepid)."""
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


def sync(path: Path) -> None:
    """Flush a file's bytes or a folder's entries to disk."""
    if path.is_file():
        # Some writers make files private; what others share is as open as the umask lets it be.
        path.chmod(0o666 & ~_UMASK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
