"""Digests of a model's files, remembered in the store.

Weights are digested as files, never as live tensors: under ZeRO-3 those are empty.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dpo_dist.digests import content_digest, remembered_digest, text_digest
from dpo_dist.model.folder import weight_files
from dpo_dist.reference.key import MEMO_FOLDER

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
        digests = list(pool.map(lambda file: remembered_digest(file, memo), files))
    parts = [(file.name, digest) for file, digest in zip(files, digests, strict=True)]
    return text_digest(json.dumps(parts))


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
    return text_digest(json.dumps(parts))
