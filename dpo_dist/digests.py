"""Content digests of files, cached on disk so that each file is read once."""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from dpo_dist.atomic import collect_abandoned, write_text
from dpo_dist.errors import ConfigError
from dpo_dist.small_files import read_small

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
