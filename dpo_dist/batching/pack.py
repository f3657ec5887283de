"""Packed layout of a micro-batch: no padding, each shared token stored once.

A packed micro-batch is one sequence of segments (batching/prefix_tree.py): of each row, a prompt with a
response, the tokens that no row before has. Position ids count the tokens of the row, and in attention
(model/attention/) a token sees those of its row only. The last token of a response predicts nothing and is
not stored. A token that the loss does not count is an input, but no target.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from dpo_dist.batching.content_keys import Keys
from dpo_dist.batching.costs import Arrangement, ComputeCosts
from dpo_dist.batching.prefix_tree import Segment, paths, prefix_tree
from dpo_dist.data import Example, ImageInput, Mask, TokenIds
from dpo_dist.objective.distillation import TeacherInputs

DUMMY_RESPONSES = 2  # in a `dummy_batch`


@dataclass(frozen=True)
class PackedImages:
    """The images in the prompts of a micro-batch, each distinct one once.

    If no prompt has one, the inputs are of one invented image with weight 0, which keeps collective calls
    equal to those of a rank with images (law L2).
    """

    inputs: dict[str, Tensor]  # the processor's output for the distinct images, end to end
    tokens: tuple[int, ...]  # placeholders of each distinct image in a prompt
    order: tuple[tuple[int, ...], ...]  # images of each example, as indices of distinct ones
    prompts: tuple[TokenIds, ...]  # of each example, on the host
    grids: Tensor | None  # int64 [distinct, 3], on the host: times, rows, columns of patches; None: not used

    @property
    def is_dummy(self) -> bool:
        """Whether the inputs are of an invented image."""
        return not any(self.order)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank."""

    input_ids: Tensor  # int64 [tokens]
    position_ids: Tensor  # int64 [tokens]
    layout: tuple[tuple[int, ...], ...]  # of each example the lengths of its prompt, response, response, ...
    segments: tuple[Segment, ...]  # of the packed sequence, in its order
    rows: tuple[npt.NDArray[np.int64], ...]  # of each response, the indices of its row in `input_ids`
    # int64 [2, targets], response of each target, and index in `input_ids` of the token that predicts it: the
    # last token of the prompt predicts the first of every response. Stays on the host, so that targets are
    # regrouped and shared among ranks without a wait for the device.
    target_places: npt.NDArray[np.int64]
    targets: Tensor  # int64 [targets], the completion tokens to score, response after response
    response_tokens: Tensor  # int64 [responses], number of targets of each response
    keys: Keys  # uint64 [responses, 2], content addresses, on the host; none for a dummy
    weights: Tensor  # float32 [pairs], 1; 0 for a dummy, which only keeps collective calls equal (law L2)
    # int64 [pairs, 2 + n], indices in `response_tokens` of each pair's best response, its worst, and those
    # between them, padded with -1; None if every pair has two responses.
    ranking: Tensor | None = None
    score_gaps: Tensor | None = None  # float32 [pairs], score of the best response minus the worst's, or nan
    loss_weight: Tensor | None = None  # float64 [pairs], one of `NUMBERS`, as the next two; None: no effect
    soft_label: Tensor | None = None
    margin: Tensor | None = None
    token_weights: Tensor | None = None  # float32 [targets], factors of the log-probs, if the loss has them
    reference_logps: Tensor | None = None  # float32 [targets]; None: a forward pass computes them
    teacher: TeacherInputs | None = None
    sources: Tensor | None = None  # int64 [pairs], index of each pair's source in the dataset's labels
    mask: Mask | None = None  # bool [completion tokens], which are targets, on the host; None: all
    images: PackedImages | None = None  # None if no rank has an image in this micro-batch
    # Most responses of any rank in this micro-batch: a model with one forward per response runs this many
    # forwards on every rank (law L2); 0: only one rank computes.
    forwards: int = 0
    # Of scorers that read other prompts: the keys of the responses behind these; and the batch with these
    # prompts, for a model that scores it.
    other_keys: Mapping[str, Keys] = field(default_factory=dict)
    views: Mapping[str, "PackedBatch"] = field(default_factory=dict)

    def keys_for(self, scorer: str) -> Keys:
        """Return the content addresses of the responses as a scorer reads them, uint64 [responses, 2]."""
        return self.other_keys.get(scorer, self.keys)

    def view(self, scorer: str) -> "PackedBatch":
        """Return the batch as a scorer reads it; it has to be one of the `views` if the prompts differ."""
        assert scorer in self.views or scorer not in self.other_keys, "only its keys are known"
        return self.views.get(scorer, self)

    @property
    def pair_tokens(self) -> list[tuple[int, ...]]:
        """Number of targets of each example's responses; the batch is on the host."""
        tokens = iter(self.response_tokens.tolist())
        return [tuple(itertools.islice(tokens, len(pieces) - 1)) for pieces in self.layout]

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of each response, whether the loss counts them or not."""
        inputs = itertools.chain.from_iterable(pieces[1:] for pieces in self.layout)
        return [tokens + 1 for tokens in inputs]  # the last one is no input

    @property
    def tokens(self) -> int:
        """Number of tokens computed for examples; 0 for a dummy."""
        return len(self.input_ids) if len(self.keys) else 0

    def computed_tokens(self, arrangement: Arrangement) -> int:
        """Return the tokens that the forwards of this batch compute, with their padding."""
        return arrangement.computed_tokens(len(self.input_ids), list(map(len, self.rows)))

    def size_in_words(self, arrangement: Arrangement) -> str:
        """Return the computed tokens and the pairs of this batch as text."""
        longest = max(map(sum, self.layout))
        padding = " with padding" if arrangement is Arrangement.padded else ""
        tokens = self.computed_tokens(arrangement)
        return f"{tokens} tokens{padding} in {len(self.layout)} pairs, the longest of {longest}"

    @property
    def predictors(self) -> Tensor:
        """Return int64 [targets]: the index in `input_ids` of the token that predicts each target."""
        return copy_to_device(self.input_ids.device, self.target_places[1])

    @property
    def lengths(self) -> Tensor:
        """Return int64 [responses]: the tokens of each response that are inputs."""
        tokens = [tokens for _, *responses in self.layout for tokens in responses]
        return copy_to_device(self.input_ids.device, np.array(tokens, dtype=np.int64))

    @property
    def repeats(self) -> Tensor:
        """Return float32 [tokens]: how often a batch with one response per row would repeat each token.

        A token counts once for each row that has it, a dummy token not at all.
        """
        counts = np.bincount(np.concatenate(self.rows), minlength=len(self.input_ids)).astype(np.float32)
        repeated = counts if len(self.keys) else np.zeros_like(counts)
        return copy_to_device(self.input_ids.device, repeated)

    def with_one_target(self) -> "PackedBatch":
        """Return the batch with its first target only: enough for a forward, but not a pair for the loss."""
        ends = self.response_tokens.cumsum(0).clamp(max=1)
        return replace(
            self,
            target_places=self.target_places[:, :1],
            targets=self.targets[:1],
            response_tokens=ends.diff(prepend=ends.new_zeros(1)),
        )

    def to(self, device: torch.device) -> "PackedBatch":
        """Copy the tensors to `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "PackedBatch":
        """Copy the tensors to page-locked memory, from which a copy to a CUDA device is asynchronous."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.images is not None:
            inputs = {name: change(value) for name, value in self.images.inputs.items()}
            changed["images"] = replace(self.images, inputs=inputs)
        if self.teacher is not None:
            changed["teacher"] = self.teacher.map(change)
        changed["views"] = {scorer: view._with_tensors(change) for scorer, view in self.views.items()}
        return replace(self, **changed)


def copy_to_device(device: torch.device, array: npt.NDArray[Any]) -> Tensor:
    """Return the array on `device`: itself on the CPU, else a copy, asynchronous from pinned memory."""
    source = torch.from_numpy(array)
    if device.type != "cuda":
        return source
    # CUDA would gather the elements of a strided array in pageable memory.
    return source.contiguous().pin_memory().to(device, non_blocking=True)


def pack(
    examples: Sequence[Example],
    keys: Keys,
    is_good: npt.NDArray[np.bool_] | None = None,
    dummy_image: ImageInput | None = None,
    costs: ComputeCosts | None = None,
) -> PackedBatch:
    """Pack examples into one micro-batch; `keys` are the content keys of their whole responses.

    `is_good`: labels of examples with one response. A bad one has no best response, but a worst one.
    `dummy_image`: an invented image, if another rank has an image in its micro-batch. With `costs`, more than
    prompts is shared where it pays.
    """
    segments = prefix_tree(examples, costs)
    indices = {
        segment.row: np.concatenate([np.arange(*part) for part in path])
        for segment, path in zip(segments, paths(segments), strict=True)
    }
    rows = [indices[number] for number in range(len(segments))]
    # Not `prefixes.input_rows`, which has words of images' digests in the place of the placeholders.
    ids: list[TokenIds] = []
    responses: list[TokenIds] = []
    for example in examples:
        ids += [np.concatenate((example.prompt_ids, response[:-1])) for response in example.responses]
        responses += example.responses
    positions = [np.arange(shared, shared + own) for _, shared, own in segments]
    # A row ends before the response's last token, so its last len(response) tokens predict the response.
    predictors = [row[-len(response) :] for row, response in zip(rows, responses, strict=True)]
    mask = None
    if any(example.trained for example in examples):
        mask = np.concatenate([*itertools.chain.from_iterable(example.masks for example in examples)])
    is_target = slice(None) if mask is None else mask
    numbers = np.repeat(np.arange(len(responses)), list(map(len, responses)))
    target_places = np.stack((numbers, np.concatenate(predictors)))[:, is_target]
    return PackedBatch(
        input_ids=_int64(np.concatenate([ids[row][shared:] for row, shared, _ in segments])),
        position_ids=_int64(np.concatenate(positions)),
        layout=tuple(example.layout for example in examples),
        segments=tuple(segments),
        rows=tuple(rows),
        target_places=target_places,
        targets=_int64(np.concatenate(responses)[is_target]),
        response_tokens=_int64(np.bincount(target_places[0], minlength=len(responses))),
        keys=keys,
        weights=torch.ones(len(examples)),
        ranking=_ranking([len(example.responses) for example in examples], is_good),
        mask=mask,
        images=_images(examples, dummy_image),
    )


def dummy_batch(dummy_image: ImageInput | None = None) -> PackedBatch:
    """Return the smallest batch whose backward gives all weights a gradient, with weight 0.

    Rows of one input would give no gradient to weights that carry a state to the next token (RWKV).
    `dummy_image`: see `pack`.
    """
    ids = np.zeros(1, dtype=np.int32)
    example = Example(np.zeros(2, dtype=np.int32), (ids, ids))
    keys = np.empty((0, 2), dtype=np.uint64)
    batch = pack([example], keys, dummy_image=dummy_image)
    # A gap of 1: losses take its logarithm, and 0 times an infinite loss is nan.
    return replace(batch, weights=torch.zeros(1), score_gaps=torch.ones(1))


def _images(examples: Sequence[Example], dummy: ImageInput | None) -> PackedImages | None:
    """Return the images of these examples, or `dummy` if they have none."""
    distinct: dict[bytes, ImageInput] = {}
    for example in examples:
        distinct |= {image.digest: image for image in example.images}
    members = list(distinct.values()) or ([] if dummy is None else [dummy])
    if not members:
        return None
    numbers = {digest: number for number, digest in enumerate(distinct)}
    inputs = joined_inputs(members)
    return PackedImages(
        inputs=inputs,
        tokens=tuple(image.tokens for image in members),
        order=tuple(tuple(numbers[image.digest] for image in example.images) for example in examples),
        prompts=tuple(example.prompt_ids for example in examples),
        grids=inputs.get("image_grid_thw"),
    )


def joined_inputs(images: Sequence[ImageInput]) -> dict[str, Tensor]:
    """Return the processor's output for several images, in their order."""
    return {name: _joined([image.inputs[name] for image in images]) for name in images[0].inputs}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors end to end, padded with 0 to one size, as a processor pads several images."""
    largest = list(map(max, zip(*(part.shape[1:] for part in parts), strict=True)))
    padded = []
    for part in parts:
        ends: list[int] = []
        for most, size in zip(
            reversed(largest), reversed(part.shape[1:]), strict=True
        ):  # the last dim is first
            ends += [0, most - size]
        padded.append(pad(part, ends))
    return torch.cat(padded)


def _ranking(counts: Sequence[int], is_good: npt.NDArray[np.bool_] | None) -> Tensor | None:
    """Return `PackedBatch.ranking` of examples with these numbers of responses."""
    if set(counts) == {2}:
        return None
    ranking = np.full((len(counts), max(2, *counts)), -1)
    start = 0
    for pair, count in enumerate(counts):
        # The worst is second, where a pair has it: losses of pairs compare the two ends of a ranking.
        best, *others = range(start, start + count)
        ranking[pair, :count] = [best, *others[-1:], *others[:-1]]
        start += count
    if is_good is not None:
        ranking = np.where(is_good[:, None], ranking, ranking[:, ::-1])
    return _int64(ranking)


def _int64(array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


@dataclass(frozen=True)
class PaddedRows:
    """The responses of a micro-batch, each in a row behind a prompt of its own."""

    input_ids: Tensor  # int64 [rows, longest], padded at the end
    lengths: tuple[int, ...]  # tokens of each row without padding
    is_token: Tensor  # bool [rows, longest], whether it is not padding
    predictors: Tensor  # int64 [targets], index in the flat `input_ids` of the token that predicts each


def padded_rows(batch: PackedBatch, pad_id: int) -> PaddedRows:
    """Return `batch` as rows, in the order of its responses; on any device, without a synchronization."""
    lengths = np.array(list(map(len, batch.rows)))
    longest = int(lengths.max())
    # Added to a token's index in the concatenated rows, a shift gives its index in the padded rows.
    shifts = np.arange(len(lengths)) * longest - (np.cumsum(lengths) - lengths)
    places = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
    device = batch.input_ids.device
    input_ids = torch.full((len(lengths) * longest,), pad_id, dtype=torch.int64, device=device)
    is_token = torch.zeros_like(input_ids, dtype=torch.bool)
    on_device = copy_to_device(device, places)
    input_ids[on_device] = batch.input_ids[copy_to_device(device, np.concatenate(batch.rows))]
    is_token[on_device] = True
    rows, predictors = batch.target_places
    in_rows = np.concatenate([np.arange(shared, shared + own) for _, shared, own in batch.segments])
    return PaddedRows(
        input_ids=input_ids.view(len(lengths), longest),
        lengths=tuple(lengths.tolist()),
        is_token=is_token.view(len(lengths), longest),
        predictors=copy_to_device(device, rows * longest + in_rows[predictors]),
    )
