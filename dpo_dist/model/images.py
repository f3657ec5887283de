"""Images in a forward: encoded once, placed among the tokens, with their own positions and attention."""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo_dist.batching.pack import PackedBatch, PackedImages, copy_to_device
from dpo_dist.batching.prefix_tree import Segment
from dpo_dist.data import TokenIds
from dpo_dist.model.architectures import ImageMask, image_mask
from dpo_dist.model.attention.sdpa import ImageRuns

T = TypeVar("T")

# Inputs with the kind of each token: 1 for those of an image. Models choose masks or positions by it.
_KINDS = ("token_type_ids", "mm_token_type_ids")


class ImageReader:
    """Calls the parts of a transformers model that read images; see `layers.check_reads_images`.

    The model's own forward encodes the images of each row and finds out positions and masks by itself; inside
    `by_own_forward`, `is_own_forward` says that rows are to be computed by it.
    """

    def __init__(self, causal_lm: Any):
        self._causal_lm = causal_lm
        self.is_own_forward = False
        self.mask = image_mask(causal_lm.config)

    @contextmanager
    def by_own_forward(self) -> Iterator[None]:
        """Inside the block, let the model's own forward compute each row from its pixels."""
        self.is_own_forward = True
        try:
            yield
        finally:
            self.is_own_forward = False
            body = self._causal_lm.base_model
            if hasattr(body, "rope_deltas"):  # of the last row; generation would go on from there
                body.rope_deltas = None

    def own_inputs(self, images: Mapping[str, Tensor], input_ids: Tensor) -> dict[str, Any]:
        """Return what the model's own forward takes for rows [rows, tokens] and the images in them.

        `images` are the processor's outputs for these images, in the order of the rows.
        """
        accepted = inspect.signature(self._causal_lm.forward).parameters
        kinds = {name: self._kinds(input_ids) for name in _KINDS if name in accepted}
        return kinds | self._converted(images, input_ids.device)

    def encode(self, batch: PackedBatch) -> "EncodedImages | None":
        """Return the images of a batch, each distinct one encoded once; None if no rank has an image.

        Images are encoded before the text part, so that ZeRO-3 gathers weights in one order on all ranks,
        including those that encode a dummy.
        """
        images = batch.images
        if images is None:
            return None
        inputs = self._converted(images.inputs, batch.input_ids.device)
        features = self._owner.get_image_features(**inputs, return_dict=True)
        return EncodedImages(self, features, images, batch.layout, batch.segments)

    def runs(self, parts: Sequence[TokenIds]) -> ImageRuns | None:
        """Return the runs of image tokens in parts of prompts; None if these tokens see earlier ones only."""
        if self.mask is ImageMask.causal:
            return None
        edges = [
            np.flatnonzero(np.diff(part == self.token, prepend=False, append=False)).tolist()
            for part in parts
        ]
        places = tuple(tuple(zip(ends[::2], ends[1::2], strict=True)) for ends in edges)
        return ImageRuns(places, in_windows_only=self.mask is ImageMask.in_windows)

    def row_kinds(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the input from which a model, if its image tokens see each other, makes the mask of rows."""
        if self.mask is ImageMask.causal:
            return {}
        return {_KINDS[self.mask is ImageMask.in_windows]: self._kinds(input_ids)}

    def prompt_positions(self, prompt: TokenIds, grids: Tensor | None) -> npt.NDArray[np.int64] | None:
        """Return a prompt's positions in time and space, [3, tokens]; None if the model has usual ones.

        `grids`: those of the prompt's images. Everything is on the host.
        """
        find = getattr(self._causal_lm.base_model, "get_rope_index", None)
        if find is None:
            return None
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        positions: Tensor = find(ids, mm_token_type_ids=self._kinds(ids), image_grid_thw=grids)[0][:, 0]
        return positions.numpy()

    @property
    def token(self) -> int:
        """The id of an image's placeholders."""
        return int(self._causal_lm.config.image_token_id)

    @property
    def _owner(self) -> Any:
        body = self._causal_lm.base_model
        return body if hasattr(body, "get_image_features") else self._causal_lm

    def _kinds(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.token).int()

    def _converted(self, images: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the encoder's inputs on a device, with pixels in the dtype of the model's weights."""
        dtype = self._causal_lm.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in images.items()
        }


@dataclass(frozen=True)
class EncodedImages:
    """The encoded images of a micro-batch, and what they change in the inputs of the text part."""

    reader: ImageReader
    features: Any  # the encoder's outputs for the distinct images
    images: PackedImages
    layout: tuple[tuple[int, ...], ...]
    segments: tuple[Segment, ...]

    @property
    def runs(self) -> ImageRuns | None:
        """Return the runs of image tokens in the packed segments; see `ImageReader.runs`."""
        return self.reader.runs([self._prompts[row][shared:] for row, shared, _ in self.segments])

    def packed_inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the inputs of the packed sequence."""
        order: list[int] = []
        for row, shared, _ in self.segments:
            before = self._prompts[row][:shared]
            images = self._row_orders[row]
            ends = np.cumsum([self.images.tokens[number] for number in images])
            first = np.searchsorted(ends, np.count_nonzero(before == self.reader.token), side="right")
            order += images[int(first) :]
        inputs = self._features(order)
        if inputs and self._row_positions is not None:
            own = torch.cat([self._row_positions[row][shared:] for row, shared, _ in self.segments])
            inputs["position_ids"] = copy_to_device(device, own.T.numpy())[:, None]
        return inputs

    def row_inputs(self, input_ids: Tensor, first: int) -> dict[str, Any]:
        """Return the inputs of rows [rows, tokens], of which `first` is the number in the micro-batch."""
        if self.images.is_dummy:
            return {}
        rows = slice(first, first + len(input_ids))
        inputs = self._features([*itertools.chain.from_iterable(self._row_orders[rows])])
        if self._row_positions is not None:
            padded = pad_sequence(self._row_positions[rows], batch_first=True).permute(2, 0, 1)
            inputs["position_ids"] = copy_to_device(input_ids.device, padded.numpy())
        return inputs | self.reader.row_kinds(input_ids)

    def with_dummy_gradient(self, predicting: Tensor) -> Tensor:
        """Return `predicting` plus 0 times the features of a dummy, so that the encoder gets a gradient.

        The sum is in float32: in fp16 it can be infinite, and 0 times infinity is NaN.
        """
        if not self.images.is_dummy:
            return predicting
        values = [self.features.pooler_output, *(getattr(self.features, "deepstack_features", None) or ())]
        total = torch.stack([_flat(value).float().sum() for value in values]).sum()
        return predicting + (0.0 * total).to(predicting.dtype)

    @property
    def _prompts(self) -> list[TokenIds]:
        """Return the prompt of each response."""
        return self._of_responses(self.images.prompts)

    @property
    def _row_orders(self) -> list[tuple[int, ...]]:
        """Return the images of each response's prompt."""
        return self._of_responses(self.images.order)

    def _of_responses(self, of_examples: Sequence[T]) -> list[T]:
        values: list[T] = []
        for value, (_, *responses) in zip(of_examples, self.layout, strict=True):
            values += [value] * len(responses)
        return values

    @cached_property
    def _row_positions(self) -> list[Tensor] | None:
        """Return the positions [tokens, 3] of each response with its prompt; None: usual ones.

        A response goes on after the largest position of its prompt, on all axes.
        """
        of_rows = []
        for prompt, order, (_, *responses) in zip(
            self.images.prompts, self.images.order, self.layout, strict=True
        ):
            grids = None if self.images.grids is None or not order else self.images.grids[list(order)]
            positions = self.reader.prompt_positions(prompt, grids)
            if positions is None:
                return None
            after = positions.max() + 1
            for tokens in responses:
                further = np.tile(np.arange(after, after + tokens), (len(positions), 1))
                of_rows.append(torch.from_numpy(np.concatenate((positions, further), axis=1).T))
        return of_rows

    def _features(self, order: Sequence[int]) -> dict[str, Any]:
        """Return the input that gives the placeholders, from first to last, the features of these images."""
        if not order:
            return {}
        placed = {"pooler_output": self._placed(self.features.pooler_output, order)}
        layers = getattr(self.features, "deepstack_features", None)
        if layers is not None:
            placed["deepstack_features"] = [self._placed(layer, order) for layer in layers]
        return {"mm_encoder_outputs": {"image": replace(self.features, **placed)}}

    def _placed(self, value: Any, order: Sequence[int]) -> Any:
        parts = torch.split(_flat(value), list(self.images.tokens))
        placed = [parts[number] for number in order]
        return torch.cat(placed) if isinstance(value, Tensor) else tuple(placed)


def _flat(value: Any) -> Tensor:
    """Return features [tokens, width] from those of each image or tile, or of a batch of them."""
    return value.flatten(0, -2) if isinstance(value, Tensor) else torch.cat(list(map(_flat, value)))
