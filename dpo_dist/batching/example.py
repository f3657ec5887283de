"""An example: the token ids of a prompt, its images, the responses to it; the content keys of responses."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.prefixes import Row

if TYPE_CHECKING:
    from torch import Tensor  # processes that encode data need no torch

TokenIds: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]
Keys: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image as the model's processor makes it; the prompt has a placeholder for each of its features."""

    digest: bytes  # 16 bytes over the image's file and the processor's settings
    tokens: int  # placeholders in the prompt
    placeholder_id: int  # the token id of these
    inputs: Mapping[str, "Tensor"] = field(default_factory=dict)  # the processor's output, or nothing


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt and its responses as token ids; a model reads the prompt and one response."""

    prompt_ids: TokenIds  # int32 [prompt tokens], at least one
    responses: tuple[TokenIds, ...]  # int32 [response tokens], best first; the end of turn is last unless cut
    trained: tuple[Mask, ...] = ()  # bool [response tokens], whether the loss counts each; empty: all count
    images: tuple[ImageInput, ...] = ()  # in the order of their placeholders in the prompt

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks `trained`, with one for each response even if all tokens count."""
        return self.trained or tuple(np.ones(len(ids), dtype=np.bool_) for ids in self.responses)

    @property
    def layout(self) -> tuple[int, ...]:
        """The tokens of the prompt, and of each response without its last token."""
        return (len(self.prompt_ids), *(len(ids) - 1 for ids in self.responses))

    @property
    def rows(self) -> tuple[Row, ...]:
        """The inputs for each response: the prompt, and the response without its last token.

        Words of an image's digest, as negative ids, are in the place of its placeholders.
        """
        prompt = self.prompt_ids
        if self.images:
            words = [image_words(image.digest, image.tokens) for image in self.images]
            prompt = prompt.copy()
            prompt[prompt == self.images[0].placeholder_id] = np.concatenate(words)
        return tuple(np.concatenate((prompt, ids[:-1])) for ids in self.responses)


def image_words(digest: bytes, tokens: int) -> Row:
    """Return the words of an image's digest, as negative ids for its placeholders."""
    return np.resize(np.frombuffer(digest, dtype=np.int32), tokens) | np.int32(-(2**31))


def response_key(prompt_ids: TokenIds, response_ids: TokenIds, images: Sequence[ImageInput] = ()) -> bytes:
    """Return the content key of a response to a prompt: 16 bytes over token ids and images (law L3)."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt_ids, dtype=np.int32).tobytes())
    digest.update(np.ascontiguousarray(response_ids, dtype=np.int32).tobytes())
    for image in images:  # without images the key is that of the token ids
        digest.update(image.digest)
    return digest.digest()


def response_keys(examples: Iterable[Example]) -> Keys:
    """Return the content keys of all responses, as in a reference store; uint64 [responses, 2]."""
    keys = (
        response_key(example.prompt_ids, ids, example.images)
        for example in examples
        for ids in example.responses
    )
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)
