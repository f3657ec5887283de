"""Images of records: their places in the prompt; their files, as bytes or below an allowed folder."""

import base64
import hashlib
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
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
_TAG = re.compile("<image>")
# In other texts: placeholders of a model, perhaps with what its template writes around them; numbers (Phi and
# MMMU); names of files (Qwen-VL). `[IMG]` with an end is a tag of forums. No part of a pattern can be matched
# by the part before it, too, and none looks beyond the next tag: the time is linear in a hostile text.
_INSIDE = (
    r"<\|image_pad\|>|<\|image\|>|<\|media_pad\|>|<image_soft_token>|<IMG_CONTEXT>"
    r"|\[IMG\](?![^\s\[]*\[/IMG\])"
)
_BEFORE = r"<\|vision_start\|>|<\|begin_of_image\|>|<start_of_image>|<\|image>|<img>"
_AFTER = r"<\|vision_end\|>|<\|end_of_image\|>|<end_of_image>|<image\|>|</img>"
_OTHER_TAG = re.compile(
    rf"(?:{_BEFORE})(?:{_INSIDE})+(?:{_AFTER})|{_INSIDE}|<start_of_image>"
    r"|<\|?image[ _]?(?P<number>\d{1,2})\|?>"
    r"|<img>(?P<file>[^<>\n]+\.(?i:png|jpe?g|webp|gif|bmp|tiff?))</img>"
)
_WORDS_OF_TAGS = ("image", "img", "IMG", "media_pad")  # found in no time: most texts have none
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
        return [_metadata(os.path.join(folder, self._path)) for folder in self.folders]  # noqa: PTH118

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


def _metadata(file: str | Path) -> str:
    """Return a text that changes if a file is changed or replaced, and sometimes if not; "" if it is absent.

    The change time is included because a copy can keep the modification time and the size.
    """
    try:
        status = os.stat(file)  # noqa: PTH116  (of millions of files: a Path takes longer than its state)
    except (OSError, ValueError):
        return ""
    times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
    return f"{status.st_dev}|{status.st_ino}|{status.st_size}|{times}"


def place_images(
    prompt: Prompt, responses: Sequence[Response], record: Fields, folders: tuple[str, ...], *, is_plain: bool
) -> tuple[Prompt, tuple[ImageFile, ...]]:
    """Return the prompt with an `IMAGE` for each of a record's images, and their files.

    The places are the image parts of messages; without any, the tags `<image>` of the texts, else those of
    other programs, which may name the files; without these too, the start of the first user's turn, as in TRL
    and ms-swift. Raises UnusableRecordError: `image_count`, `image_in_response`, or `image_unreadable` for a
    value that is not an image.
    """
    given, turns = given_images(record), turns_of(prompt, "user")
    placed = [image for turn in turns for image in turn.fields.get(PLACED, ())]
    if any(PLACED in turn.fields for response in responses for turn in turns_of(response)):
        raise UnusableRecordError("image_in_response", "a response has an image")
    contents = [turn.content for turn in turns]
    pattern = _TAG if any(map(_TAG.search, contents)) else _OTHER_TAG
    tags = [tag for content in contents if _may_have_tags(content) for tag in pattern.finditer(content)]
    has_places = not is_plain and not isinstance(prompt, Dialogue)
    if not given and not placed and has_places:
        given = _named_files(tags)
    if not given and not placed:
        return prompt, ()
    if places := sum(image is None for image in placed):
        what = f"{pluralize(places, 'image part')} without an image"
    elif placed or not has_places:
        what = "and no place for images"
    elif places := len(tags):
        what = f"{pluralize(places, 'tag')} of images"
        contents = [pattern.sub(IMAGE, content) for content in contents]
        given = _in_order(given, tags)
    else:
        what = "and no turn of a user"
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            places = len(given)
            contents[first] = IMAGE * places + contents[first]
    # LLaMA-Factory and ms-swift count the tags of a response too.
    in_response = [
        len(tags) + sum(len(_TAG.findall(turn.content)) for turn in turns_of(each)) for each in responses
    ]
    if not placed and len(given) in in_response and len(tags) < len(given):
        raise UnusableRecordError("image_in_response", "a response has a tag <image>")
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


def has_tag(text: str, tokens: Collection[str]) -> bool:
    """Return whether a text has a tag of images, or one of a model's own `tokens`."""
    is_tagged = _may_have_tags(text) and (_TAG.search(text) or _OTHER_TAG.search(text))
    return bool(is_tagged) or any(token in text for token in tokens)


def _may_have_tags(text: str) -> bool:
    return any(word in text for word in _WORDS_OF_TAGS)


def _named_files(tags: Sequence[re.Match[str]]) -> list[str]:
    """Return the names of the files in tags; none unless each tag names one."""
    names = [tag.groupdict().get("file") for tag in tags]
    return [name for name in names if name] if all(names) else []


def _in_order(images: list[Any], tags: Sequence[re.Match[str]]) -> list[Any]:
    """Return the images as tags with numbers from 0 or 1 name them; as they are if no tag has a number."""
    numbers = [int(tag["number"]) for tag in tags if tag.groupdict().get("number")]
    if not numbers or len(tags) != len(images):
        return images
    least = min(numbers)
    if sorted(numbers) != [*range(least, least + len(images))] or least > 1:
        raise UnusableRecordError("image_count", "tags of images without a number for each image")
    return [images[number - least] for number in numbers]


def _image_file(value: Any, folders: tuple[str, ...]) -> ImageFile:
    """Return the file of an image: bytes, a path, an object with one of them, or an image of Pillow."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UnusableRecordError("invalid_unicode", "the name of an image has a lone surrogate")
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
