"""Images of records: their places in the prompt; their files, as bytes or below an allowed folder."""

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_dist.data.read.messages import PLACED
from dpo_dist.data.records import (
    IMAGE,
    Dialogue,
    ImageFile,
    Message,
    Prompt,
    Response,
    UnusableRecordError,
    turns_of,
)

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
# Places in images, which each model writes in its own way.
_OBJECT_TAGS = ("<bbox>", "<ref-object>")
_WORDS_OF_TAGS = ("image", "img", "IMG", "media_pad")  # found in no time: most texts have none
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def place_images(
    prompt: Prompt,
    responses: Sequence[Response],
    beside: list[Any],
    folders: tuple[str, ...],
    *,
    is_plain: bool,
) -> tuple[Prompt, tuple[ImageFile, ...]]:
    """Return the prompt with an `IMAGE` for each of its images, and their files; `beside`: of the record.

    The places are the image parts of messages; without any, the tags `<image>` of the texts, else those of
    other programs, which may name the files; without these too, the start of the first user's turn, as in TRL
    and ms-swift. Raises UnusableRecordError: `image_count`, `image_in_response`, or `image_unreadable` for a
    value that is not an image.
    """
    turns = turns_of(prompt, "user")
    parts = [image for turn in turns for image in turn.fields.get(PLACED, ())]
    if any(PLACED in turn.fields for response in responses for turn in turns_of(response)):
        raise UnusableRecordError("image_in_response", "a response has an image")
    contents = [turn.content for turn in turns]
    pattern = _TAG if any(map(_TAG.search, contents)) else _OTHER_TAG
    tags = _tags(contents, pattern)
    has_places = not is_plain and not isinstance(prompt, Dialogue)
    if not beside and not parts and has_places:
        # None, if a tag names no file.
        files = [tag.groupdict().get("file") or "" for tag in tags]
        beside = files if all(files) else []
    if not beside and not parts:
        return prompt, ()
    # The number of places for the images beside the messages.
    places = sum(image is None for image in parts)
    first_of_user = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if has_places and not parts:
        if tags:
            places = len(tags)
            contents = [pattern.sub(IMAGE, content) for content in contents]
            _check_numbers(tags)
        elif first_of_user is not None:
            places = len(beside)
            contents[first_of_user] = IMAGE * places + contents[first_of_user]
    if not parts and len(tags) < len(beside):
        # LLaMA-Factory and ms-swift count the tags of a response too.
        for response in responses:
            in_response = sum(len(_TAG.findall(turn.content)) for turn in turns_of(response))
            if len(tags) + in_response == len(beside):
                raise UnusableRecordError("image_in_response", "a response has a tag <image>")
    if places != len(beside):
        raise UnusableRecordError("image_count", f"images: {len(beside)}, places for them: {places}")
    texts = [*contents, *(turn.content for response in responses for turn in turns_of(response))]
    if any(tag in text and f"</{tag[1:]}" not in text for text in texts for tag in _OBJECT_TAGS):
        raise UnusableRecordError("unread_content", "a text has a tag of a place in an image", ("objects",))
    next_beside = iter(beside)
    images = [next(next_beside) if image is None else image for image in parts] or beside
    return (
        tuple(_with_content(turn, content) for turn, content in zip(turns, contents, strict=True)),
        tuple(_image_file(image, folders) for image in images),
    )


def _tags(contents: Sequence[str], pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """Return the tags of images in contents."""
    tags = list[re.Match[str]]()
    for content in contents:
        if _may_have_tags(content):
            tags += pattern.finditer(content)
    return tags


def _with_content(turn: Message, content: str) -> Message:
    """Return a turn with the content in which its images have their places."""
    fields = {name: value for name, value in turn.fields.items() if name != PLACED}
    return replace(turn, content=content, fields=fields)


def has_tag(text: str, tokens: Collection[str]) -> bool:
    """Return whether a text has a tag of images, or one of a model's own `tokens`."""
    is_tagged = _may_have_tags(text) and (_TAG.search(text) or _OTHER_TAG.search(text))
    return bool(is_tagged) or any(token in text for token in tokens)


def _may_have_tags(text: str) -> bool:
    return any(word in text for word in _WORDS_OF_TAGS)


def _check_numbers(tags: Sequence[re.Match[str]]) -> None:
    """Check that tags with numbers name the images in their order. Raises UnusableRecordError."""
    numbers = [int(tag["number"]) for tag in tags if tag.groupdict().get("number")]
    if numbers and numbers not in ([*range(len(tags))], [*range(1, len(tags) + 1)]):
        raise UnusableRecordError("image_count", "numbers of tags are not in the order of images")


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
