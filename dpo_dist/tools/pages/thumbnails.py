"""Images of prompts where people or judges see them: marks in texts, and data URIs."""

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np

from dpo_dist.data import IMAGE, Example, ImageFile, ImageInput, Mask, TokenIds, UnusableRecordError
from dpo_dist.data.images import decode_image
from dpo_dist.kit import PromptImages

Thumbnails = Sequence[str | None]
"""Data URIs of small JPEG files; None for an image that cannot be read."""

_MARK = "[image]"
_JPEG = "data:image/jpeg;base64,"
_THUMBNAIL_SIDE = 160


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


def only_thumbnails(images: Thumbnails) -> Thumbnails:
    """Return None in place of what is no thumbnail: a page loads nothing."""
    return [image if image and image.startswith(_JPEG) else None for image in images]


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
