"""Thumbnails of images, as data URIs that need no request; a section of a page has room for some of them."""

import base64
import io
from collections.abc import Iterable, Sequence

from dpo_dist.data.images import decode_image
from dpo_dist.data.read.images import ImageFile
from dpo_dist.data.records import UnusableRecordError

Thumbnails = Sequence[str | None]
"""Data URIs of small JPEG files; None for an image that cannot be read, or is left out."""

_SIDE = 160
_KIND = "data:image/jpeg;base64,"
_MOST, _MOST_BYTES = 100, 1_500_000


def thumbnails(files: Iterable[ImageFile | bytes]) -> list[str | None]:
    """Return the thumbnail of each image file."""
    return list(map(_thumbnail, files))


def _thumbnail(file: ImageFile | bytes) -> str | None:
    try:
        image = decode_image(file if isinstance(file, bytes) else file.read())
    except UnusableRecordError:
        return None
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    return _KIND + base64.b64encode(stream.getvalue()).decode()


class ThumbnailRoom:
    """The room for thumbnails in a section of a page."""

    def __init__(self) -> None:
        self._number, self._bytes = _MOST, _MOST_BYTES

    def fitting(self, images: Thumbnails) -> Thumbnails:
        """Return those of a prompt's thumbnails that fit, None in place of others."""
        return [image if image and self._takes(image) else None for image in images]

    def _takes(self, image: str) -> bool:
        fits = image.startswith(_KIND) and self._number > 0 and len(image) <= self._bytes
        if fits:
            self._number, self._bytes = self._number - 1, self._bytes - len(image)
        return fits
