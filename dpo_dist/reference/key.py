"""What a stored log-prob is addressed by: the reference's files, the exact ids, the numerics (law L3).

Weights are digested as files, never as live tensors: under ZeRO-3 those are empty.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.atomic import write_text
from dpo_dist.data.files import content_digest
from dpo_dist.errors import ConfigError
from dpo_dist.model.load import weight_files

# Raised when the code that computes log-probs changes their digits: the packed layout, the head.
LOGP_PATH_VERSION = 1

_MEMO = "file_digests.json"


@dataclass(frozen=True)
class ReferenceSpace:
    """All rows of one reference under one numerics profile; rows inside are addressed by token ids."""

    reference: str
    profile: dict[str, str]

    @property
    def name(self) -> str:
        """Folder name of the space: digest over reference and profile."""
        content = {"reference": self.reference, "profile": self.profile, "path": LOGP_PATH_VERSION}
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For `space.json` beside the rows."""
        return {"reference": self.reference, "profile": self.profile, "logp_path": LOGP_PATH_VERSION}


def model_digest(folder: Path, memo_folder: Path | None = None) -> str:
    """Digest of a model's function: config.json, its weight files, and code that comes with them.

    Args:
        folder: the model folder.
        memo_folder: where digests are remembered by path, size, inode and times, so that a file is read once.
    """
    files = [folder / "config.json", *weight_files(folder), *sorted(folder.glob("*.py"))]
    memo_file = memo_folder / _MEMO if memo_folder is not None else None
    memo = _read_memo(memo_file)
    identities = [_identity(file) for file in files]
    unknown = [file for file, identity in zip(files, identities, strict=True) if identity not in memo]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for file, digest in zip(unknown, pool.map(_file_digest, unknown), strict=True):
            memo[_identity(file)] = digest
    if memo_file is not None and unknown:
        write_text(memo_file, json.dumps(memo, indent=1))
    parts = [(file.name, memo[identity]) for file, identity in zip(files, identities, strict=True)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


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


def _file_digest(file: Path) -> str:
    try:
        return content_digest([file])
    except OSError as error:
        raise ConfigError("a file of the model cannot be read", where=str(file), got=str(error)) from error


def _identity(file: Path) -> str:
    # The change time too: whoever copies over a file can set its modification time, but not this one.
    status = file.resolve().stat()
    return f"{file.resolve()}|{status.st_size}|{status.st_ino}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def _read_memo(memo_file: Path | None) -> dict[str, str]:
    if memo_file is None or not memo_file.is_file():
        return {}
    try:
        memo: dict[str, str] = json.loads(memo_file.read_text())
    except ValueError:
        return {}
    return memo
