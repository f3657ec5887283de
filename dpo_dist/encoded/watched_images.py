"""Files that records name as images: what they were when they were encoded, and whether they changed."""

import os
from pathlib import Path
from typing import Any

from dpo_dist.data import ImageFile, UnusableRecordError


def recorded_state(image: ImageFile) -> dict[str, Any] | None:
    """Return name, folders and state of an image's file as it is read; None if the record has the content."""
    if image.content is not None or image.name.startswith("data:"):
        return None
    state = f"{_found(image)} {_digest(image)}"  # in this order: it may change while it is read
    return {"name": image.name, "folders": list(map(os.path.abspath, image.folders)), "state": state}


def metadata_in_folders(image: ImageFile) -> list[str]:
    """Return the metadata of the file of this name in each folder, also of one that a look-up refuses."""
    return [_metadata(os.path.join(folder, image.path)) for folder in image.folders]  # noqa: PTH118


def is_unchanged_by_metadata(image: ImageFile, state: str) -> bool:
    """Return whether the file is that of a `state`, without a look-up that resolves all links.

    Also if there is no file: its copy is stored.
    """
    return next(filter(None, metadata_in_folders(image)), "") in ("", state.partition(" ")[0])


def is_unchanged(image: ImageFile, state: str) -> bool:
    """Return whether the file has the content of a `state`, or there is none."""
    metadata, _, digest = state.partition(" ")
    return _found(image) in ("", metadata) or _digest(image) == digest


def _found(image: ImageFile) -> str:
    try:
        return _metadata(image.found())
    except (UnusableRecordError, OSError, ValueError, RuntimeError):
        return ""


def _digest(image: ImageFile) -> str:
    try:
        return image.digest.hex()
    except UnusableRecordError:
        return ""


def _metadata(file: str | Path) -> str:
    """Return a text that changes with a file's content, and may change without; "" if the file is absent.

    The change time is included because a copy can keep the modification time and the size.
    """
    try:
        status = os.stat(file)  # noqa: PTH116  (of millions of files: a Path takes longer than its state)
    except (OSError, ValueError):
        return ""
    times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
    return f"{status.st_dev}|{status.st_ino}|{status.st_size}|{times}"
