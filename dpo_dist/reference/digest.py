"""Digests of a model's files, each file read once and remembered in the store.

Weights are digested as files, never as live tensors: under ZeRO-3 those are empty.
"""

import hashlib
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_dist.atomic import write_text
from dpo_dist.data.files import content_digest
from dpo_dist.errors import ConfigError
from dpo_dist.model.load import weight_files
from dpo_dist.reference.key import MEMO_FOLDER

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def model_digest(folder: Path, store: Path | None = None) -> str:
    """Digest of a model's function: config.json, its weight files, and code that comes with them.

    Args:
        folder: the model folder.
        store: where digests are remembered by path, size, inode and times, so that a file is read once.

    Raises:
        ConfigError: a file cannot be read, or changes while it is.
    """
    files = [folder / "config.json", *weight_files(folder), *sorted(folder.glob("*.py"))]
    memo = store / MEMO_FOLDER if store is not None else None
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(lambda file: _remembered_digest(file, memo), files))
    parts = [(file.name, digest) for file, digest in zip(files, digests, strict=True)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def model_label(path: str, folder: Path) -> str:
    """A model's name for people: as it was configured, and the commit if it is a snapshot of the hub."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return f"{path}@{folder.name}" if is_snapshot else path


def tokenizer_digest(folder: Path) -> str:
    """Digest of the files that decide how text becomes ids."""
    patterns = (
        "tokenizer*",
        "*.model",
        "vocab*",
        "merges*",
        "special_tokens*",
        "added_tokens*",
        "chat_template*",
    )
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    parts = [(file.name, content_digest([file])) for file in files]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _remembered_digest(file: Path, memo: Path | None) -> str:
    # Each digest is a file of its own, named by what it is of: jobs that write at once never meet.
    try:
        identity = _identity(file)
        entry = memo / f"{_short_digest(identity)}.json" if memo is not None else None
        digest = _read_entry(entry, identity)
        if digest is None:
            digest = content_digest([file])
            if _identity(file) != identity:
                raise ConfigError(
                    "a file of the model changes while it is read",
                    where=str(file),
                    remedy="start again when the model is completely written",
                )
            _write_entry(entry, identity, digest)
    except OSError as error:
        raise ConfigError("a file of the model cannot be read", where=str(file), got=str(error)) from error
    return digest


def _identity(file: Path) -> str:
    # The change time too: whoever copies over a file can set its modification time, but not this one.
    status = file.resolve().stat()
    return f"{file.resolve()}|{status.st_size}|{status.st_ino}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def _short_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read_entry(entry: Path | None, identity: str) -> str | None:
    """The digest remembered for `identity`; None if there is none or the entry is damaged."""
    if entry is None or not entry.is_file():
        return None
    try:
        content = json.loads(entry.read_bytes())
        digest = str(content["digest"])
        if content["check"] == _short_digest(identity + digest):
            return digest
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged; the file that it is of is read again", entry)
    return None


def _write_entry(entry: Path | None, identity: str, digest: str) -> None:
    if entry is None:
        return
    content = {"file": identity, "digest": digest, "check": _short_digest(identity + digest)}
    try:
        write_text(entry, json.dumps(content, indent=1))
    except OSError as error:
        log.warning("a file's digest cannot be remembered and is computed by every start: %s", error)
