"""Images of prompts where people read them: one mark for each, in place of a character or of placeholders."""

from collections.abc import Sequence

import numpy as np

from dpo_dist.batching.example import ImageInput, Mask, TokenIds
from dpo_dist.data.records import IMAGE

MARK = "[image]"


def with_marks(text: str) -> str:
    """Return a text of a record with a readable mark for each image."""
    return text.replace(IMAGE, MARK)


def shown_tokens(ids: TokenIds, images: Sequence[ImageInput], placeholder_id: int | None) -> Mask:
    """Return which tokens of a prompt to show: of each image's placeholders only the first, and none between.

    bool [tokens]
    """
    shown, places = np.ones(len(ids), dtype=np.bool_), np.flatnonzero(ids == placeholder_id)
    for image in images:
        first, last = places[0], places[image.tokens - 1]
        shown[first + 1 : last + 1] = False
        places = places[image.tokens :]
    return shown
