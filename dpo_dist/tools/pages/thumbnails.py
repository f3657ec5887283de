"""Images of prompts where people or judges see them: marks in texts, data URIs, the room on a page."""

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np

from dpo_dist.data import IMAGE, Example, ImageFile, ImageInput, Mask, TokenIds, UnusableRecordError
from dpo_dist.data.images import decode_image
from dpo_dist.kit import PromptImages

Thumbnails = Sequence[str | None]
"""Data URIs of small JPEG files; None for an image that cannot be read, or has no room."""

_MARK = "[image]"
_JPEG = "data:image/jpeg;base64,"
_THUMBNAIL_SIDE = 160
_MOST_THUMBNAILS = 100
_THUMBNAIL_BYTES = 1_500_000


def with_marks(text: str) -> str:
    """Return a text of a record with a readable mark for each image."""
    return text.replace(IMAGE, _MARK)


def jpeg_uri(content: bytes, most: int) -> str:
    """Return an image file as the data URI of a JPEG file with at most `most` pixels a side.

    Raises UnusableRecordError.
    """
    image = decode_image(content)
    stream = io.BytesIO()
    image.thumbnail((most, most))
    image.save(stream, "JPEG", quality=90)
    return _JPEG + base64.b64encode(stream.getvalue()).decode()


def thumbnails(images: Iterable[ImageFile], most: int = _THUMBNAIL_SIDE) -> list[str | None]:
    """Return the thumbnail of each image, with at most `most` pixels a side."""
    uris: list[str | None] = []
    for image in images:
        try:
            uris.append(jpeg_uri(image.read(), most))
        except UnusableRecordError:
            uris.append(None)
    return uris


class ThumbnailRoom:
    """The room for thumbnails in a section of a page."""

    def __init__(self) -> None:
        self._number = _MOST_THUMBNAILS
        self._bytes = _THUMBNAIL_BYTES

    def fitting(self, images: Thumbnails) -> Thumbnails:
        """Return those of a prompt's thumbnails that fit, None in place of others."""
        thumbnails: list[str | None] = []
        for image in images:
            fits = image and image.startswith(_JPEG) and self._number > 0 and len(image) <= self._bytes
            thumbnails.append(image if fits else None)
            if image and fits:
                self._number -= 1
                self._bytes -= len(image)
        return thumbnails


def shown_tokens(ids: TokenIds, images: Sequence[ImageInput], placeholder_id: int | None) -> Mask:
    """Return which tokens of a prompt to show: of an image's placeholders only the first, and none between.

    bool [tokens]
    """
    is_shown = np.ones(len(ids), dtype=np.bool_)
    places = np.flatnonzero(ids == placeholder_id)
    for image in images:
        first = places[0]
        last = places[image.tokens - 1]
        is_shown[first + 1 : last + 1] = False
        places = places[image.tokens :]
    return is_shown


def shown_prompt(example: Example, images: PromptImages | None) -> tuple[TokenIds, list[str | None]]:
    """Return the tokens to show of the prompt of a dataset's example, and thumbnails of its images."""
    if images is None:
        return example.prompt_ids, []
    is_shown = shown_tokens(example.prompt_ids, example.images, images.processor.placeholder_id)
    files = [ImageFile(images.content(image)) for image in example.images]
    return example.prompt_ids[is_shown], thumbnails(files)
