"""Images of prompts where people read them: one mark for each, in place of a character or of placeholders."""

from collections.abc import Sequence

import numpy as np

from dpo_dist.batching.example import Example, ImageInput, Mask, TokenIds
from dpo_dist.data.encoded.images import PromptImages
from dpo_dist.data.records import IMAGE
from dpo_dist.tools.shared.pages.thumbnails import thumbnails

MARK = "[image]"


def with_marks(text: str) -> str:
    """Return a text of a record with a readable mark for each image."""
    return text.replace(IMAGE, MARK)


def shown_tokens(ids: TokenIds, images: Sequence[ImageInput], placeholder_id: int | None) -> Mask:
    """Return which tokens of a prompt to show: of an image's placeholders only the first, and none between.

    bool [tokens]
    """
    shown, places = np.ones(len(ids), dtype=np.bool_), np.flatnonzero(ids == placeholder_id)
    for image in images:
        first, last = places[0], places[image.tokens - 1]
        shown[first + 1 : last + 1] = False
        places = places[image.tokens :]
    return shown


def shown_prompt(example: Example, images: PromptImages | None) -> tuple[TokenIds, list[str | None]]:
    """Return the tokens to show of the prompt of a dataset's example, and thumbnails of its images."""
    if images is None:
        return example.prompt_ids, []
    shown = shown_tokens(example.prompt_ids, example.images, images.processor.placeholder_id)
    return example.prompt_ids[shown], thumbnails(map(images.content, example.images))
