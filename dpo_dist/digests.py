"""Content digests of files, remembered so that a file is read once."""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from dpo_dist.atomic import write_text
from dpo_dist.errors import ConfigError

log = logging.getLogger(__name__)

_BLOCK_BYTES = 2**22
_SAMPLE_BYTES = 4096
_SAMPLES = 16


def content_digest(files: Iterable[Path]) -> str:
    """blake2b over the bytes of `files`, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """blake2b over a text, 32 hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_identity(file: Path) -> str:
    """Path, device, size, inode, times and a few sampled blocks of a file: they change when its content does.

    The change time is included, as whoever copies over a file can set its modification time. The samples tell
    apart files of equal metadata, such as those of two read-only images that were mounted at one path.
    """
    path = file.resolve()
    samples = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        status = path.stat()  # of an opened file: a client of a network file system asks its server then
        for number in range(_SAMPLES):
            stream.seek(max(status.st_size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            samples.update(stream.read(_SAMPLE_BYTES))
    times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
    return f"{path}|{status.st_dev}|{status.st_size}|{status.st_ino}|{times}|{samples.hexdigest()}"


def remembered_digest(file: Path, memo: Path | None) -> str:
    """`content_digest` of one file, read again only if its `file_identity` has changed.

    Args:
        file: any file.
        memo: the folder where digests are remembered; None: nowhere.

    Raises:
        ConfigError: the file cannot be read, or changes while it is.
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
                    remedy="start again when the file is completely written",
                )
            remember(memo, identity, digest)
    except OSError as error:
        raise ConfigError("a file cannot be read", where=str(file), got=str(error)) from error
    return digest


def remember_digest(file: Path, memo: Path, digest: str) -> None:
    """Remember a digest that was computed while the file was written."""
    remember(memo, file_identity(file), digest)


def recall(memo: Path | None, identity: str) -> str | None:
    """Return what was remembered of `identity`; None if that is nothing or the entry is damaged."""
    if memo is None or not (entry := _entry(memo, identity)).is_file():
        return None
    try:
        content = json.loads(entry.read_bytes())
        digest = str(content["digest"])
        if content["check"] == text_digest(identity + digest):
            return digest
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged; what it says is computed again", entry)
    return None


def remember(memo: Path | None, identity: str, digest: str) -> None:
    """Remember a digest, or another short text, that follows from `identity` alone."""
    if memo is None:
        return
    content = {"file": identity, "digest": digest, "check": text_digest(identity + digest)}
    try:
        write_text(_entry(memo, identity), json.dumps(content, indent=1))
    except OSError as error:
        log.warning("a digest cannot be remembered and is computed by every start: %s", error)


def _entry(memo: Path, identity: str) -> Path:
    # Each digest is a file of its own, named by what it is of: jobs that write at once never meet.
    return memo / f"{text_digest(identity)}.json"
