"""Atomic writes of files and folders (law L4): temporary name, fsync, rename, fsync of the parent folder."""

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_TEMPORARY = ".tmp-"
_ABANDONED_SECONDS = 24 * 3600
_REPLACED = "replaced-"
# Names of this module only: users have files of similar names.
_LEFT = re.compile(r"\.tmp-(?:(replaced)-|([0-9a-f]{8})-(\d+)-(-?\d+)-)?[0-9a-f]{12}")

# Of linux/fcntl.h and linux/fs.h.
_WORKING_FOLDER = -100
_EXCHANGE = 2

_UMASK = os.umask(0)
os.umask(_UMASK)


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


def sync(path: Path) -> None:
    """Flush a file's bytes or a folder's entries to disk."""
    if path.is_file():
        # Some writers create private files; shared files get the permissions of the umask.
        path.chmod(0o666 & ~_UMASK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
