"""Images of records: their places in the prompt; their files, as bytes or below an allowed folder."""

import base64
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any

from dpo_dist.data.read.messages import PLACED, given_images
from dpo_dist.data.records import (
    IMAGE,
    MAX_RECORD_BYTES,
    Dialogue,
    Prompt,
    Response,
    UnusableRecordError,
    shown_key,
    turns_of,
)
from dpo_dist.foundation.text import pluralize
from dpo_dist.foundation.types import Fields

# The place of an image in the texts of LLaMA-Factory, ms-swift and LLaVA.
_TAG = "<image>"
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class ImageFile:
    """The file of an image: its content, or its name, looked up in `folders` in their order.

    Wherever a link leads, the file must be below one of the folders. A name can be a base64 `data:` URI.
    """

    content: bytes | None = field(default=None, repr=False)
    name: str = ""
    folders: tuple[str, ...] = ()

    def read(self) -> bytes:
        """Return the content of the file. Raises UnusableRecordError: `image_unreadable`, with the cause."""
        content = self.content
        try:
            if content is None and self.name.startswith("data:"):
                content = base64.b64decode(self.name.partition(";base64,")[2], validate=True)
            elif content is None:
                with self._file().open("rb") as stream:
                    content = stream.read(MAX_RECORD_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as fault:  # RuntimeError: links in a circle
            raise UnusableRecordError("image_unreadable", f"{type(fault).__name__} for its file") from fault
        if not 0 < len(content) <= MAX_RECORD_BYTES:
            detail = (
                f"a file of {len(content):,} bytes" if not content else f"over {MAX_RECORD_BYTES:,} bytes"
            )
            raise UnusableRecordError("image_unreadable", detail)
        return content

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over the content of the file."""
        return hashlib.blake2b(self.read(), digest_size=16).digest()

    @property
    def watched(self) -> dict[str, Any] | None:
        """The name, the folders, and the file's state as it is read; None if the record has the content."""
        if self.content is not None or self.name.startswith("data:"):
            return None
        state = f"{self._found()} {self._content_digest()}"  # in this order: it may change while it is read
        return {"name": self.name, "folders": list(map(os.path.abspath, self.folders)), "state": state}

    @property
    def named(self) -> list[str]:
        """The metadata of the file of this name in each folder, also of one that a look-up refuses."""
        return [_metadata(Path(folder, self._path)) for folder in self.folders]

    def is_surely(self, state: str) -> bool:
        """Return whether the file is that of a `state`, without a look-up that resolves all links.

        Also if there is no file: its copy is stored.
        """
        return next(filter(None, self.named), "") in ("", state.partition(" ")[0])

    def is_still(self, state: str) -> bool:
        """Return whether the file has the content of a `state`, or there is none."""
        metadata, _, digest = state.partition(" ")
        return self._found() in ("", metadata) or self._content_digest() == digest

    def _found(self) -> str:
        try:
            return _metadata(self._file())
        except (UnusableRecordError, OSError, ValueError, RuntimeError):
            return ""

    def _content_digest(self) -> str:
        try:
            return self.digest.hex()
        except UnusableRecordError:
            return ""

    @property
    def _path(self) -> str:
        return self.name.removeprefix("file://")

    def _file(self) -> Path:
        name = self._path
        if "://" in name:
            raise UnusableRecordError("image_unreadable", "a URL is not fetched")
        roots = [Path(folder).resolve() for folder in self.folders]
        files = [root / name for root in roots if (root / name).resolve().is_file()]
        if allowed := [file for file in files if any(map(file.resolve().is_relative_to, roots))]:
            return allowed[0]
        what = "is outside the folders of images" if files else "does not exist"
        raise UnusableRecordError("image_unreadable", f"the file {shown_key(Path(name).name)} {what}")


def _metadata(file: Path) -> str:
    """Return a text that changes if a file is changed or replaced, and sometimes if not; "" if it is absent.

    The change time is included because a copy can keep the modification time and the size.
    """
    try:
        status = file.stat()
    except (OSError, ValueError):
        return ""
    times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
    return f"{status.st_dev}|{status.st_ino}|{status.st_size}|{times}" if S_ISREG(status.st_mode) else ""


def place_images(
    prompt: Prompt, responses: Sequence[Response], record: Fields, folders: tuple[str, ...], *, is_plain: bool
) -> tuple[Prompt, tuple[ImageFile, ...]]:
    """Return the prompt with an `IMAGE` for each of a record's images, and their files.

    The places are the image parts of messages; without any, the tags `<image>` of the texts; without these
    too, the start of the first user's turn, as in TRL and ms-swift. Raises UnusableRecordError:
    `image_count`, `image_in_response`, or `image_unreadable` for a value that is not an image.
    """
    given, turns = given_images(record), turns_of(prompt, "user")
    placed = [image for turn in turns for image in turn.fields.get(PLACED, ())]
    if any(PLACED in turn.fields for response in responses for turn in turns_of(response)):
        raise UnusableRecordError("image_in_response", "a response has an image")
    if not given and not placed:
        return prompt, ()
    contents = [turn.content for turn in turns]
    tags = sum(content.count(_TAG) for content in contents)
    if places := sum(image is None for image in placed):
        what = f"{pluralize(places, 'image part')} without an image"
    elif placed or is_plain or isinstance(prompt, Dialogue):
        what = "and no place for images"
    elif places := tags:
        what = f"{pluralize(tags, 'tag')} {_TAG}"
        contents = [content.replace(_TAG, IMAGE) for content in contents]
    else:
        what = "and no turn of a user"
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            places = len(given)
            contents[first] = IMAGE * places + contents[first]
    # LLaMA-Factory and ms-swift count the tags of a response too.
    in_response = [tags + sum(turn.content.count(_TAG) for turn in turns_of(each)) for each in responses]
    if not placed and len(given) in in_response and tags < len(given):
        raise UnusableRecordError("image_in_response", f"a response has a tag {_TAG}")
    if places != len(given):
        raise UnusableRecordError("image_count", f"{pluralize(len(given), 'image')}, {what}")
    own = iter(given)
    images = [next(own) if image is None else image for image in placed] or given
    return (
        tuple(
            replace(turn, content=content, fields={k: v for k, v in turn.fields.items() if k != PLACED})
            for turn, content in zip(turns, contents, strict=True)
        ),
        tuple(_image_file(image, folders) for image in images),
    )


def _image_file(value: Any, folders: tuple[str, ...]) -> ImageFile:
    """Return the file of an image: bytes, a path, an object with one of them, or an image of Pillow."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, str):
        return ImageFile(None, value, folders)
    try:
        return ImageFile(as_file(value))
    except ValueError as fault:
        raise UnusableRecordError("image_unreadable", str(fault)) from fault


def as_file(image: Any) -> bytes:
    """Return the PNG of an image of Pillow, without loss, or the bytes of a file. Raises ValueError."""
    if isinstance(image, bytes):
        return image
    if not (hasattr(image, "save") and hasattr(image, "mode")):
        raise ValueError(f"a {type(image).__name__} is not an image, nor the bytes or the path of one")
    stream = io.BytesIO()
    try:
        if image.mode not in _PNG_MODES:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.save(stream, "PNG")
    except Exception as fault:  # an image that is decoded only now can raise anything
        raise ValueError(f"an image of Pillow cannot be written ({type(fault).__name__})") from fault
    return stream.getvalue()
