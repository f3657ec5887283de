"""An example: the token ids of a prompt, its images, the responses to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor  # processes that encode data need no torch

TokenIds: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]


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
