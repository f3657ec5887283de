"""Packed attention by PyTorch's SDPA, one segment at a time, with any mask.

The queries of a segment see the keys of its row (batching/prefix_tree.py). A mask covers one segment. Where
the tokens of an image see each other, a segment is cut into text and images.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dpo_dist.batching.prefix_tree import Segment, paths

# A mask's rows start at multiples of this many elements; otherwise PyTorch's CUDA kernels copy the mask.
_ALIGNMENT = 16
# Dimensions added for a sink: kernels want multiples of 8.
_SINK_DIMS = 8
# Up to this many keys in a segment, PyTorch's CPU kernel is slower in bf16 than in float32.
_CPU_FLOAT32_KEYS = 256


@dataclass(eq=False)
class MaskRule:
    """The mask function of all layers of one kind in one forward, and the masks computed from it.

    In sequences of at most `reach` tokens, the size of a sliding window or chunk, every earlier key is
    visible.
    """

    function: Callable[..., Any]  # as in transformers: (batch, head, query position, key position) -> visible
    reach: int | None  # None: unknown
    by_element: bool  # the function takes one pair of positions at a time
    device: torch.device
    _masks: dict[Any, Tensor] = field(default_factory=dict, init=False)

    def __getitem__(self, selected: tuple[slice, ...]) -> "MaskRule":
        """Return this rule, for Gemma 4's code, which indexes masks; it must select all queries and keys."""
        if any(part not in (slice(None), slice(0, None)) for part in selected):
            raise IndexError(f"packed attention cannot select a part of a mask: {selected}")
        return self

    def is_causal(self, keys: int) -> bool:
        """Return whether every earlier token is visible in a sequence of `keys` tokens."""
        return self.function is causal_mask_function or (self.reach is not None and keys <= self.reach)

    def mask(self, queries: int, keys: int, dtype: torch.dtype, sinks: int = 0) -> Tensor:
        """Return the mask [queries, sinks + keys] of the last queries: 0 for visible keys, else -inf.

        Every query sees the sinks. Layers share the mask.
        """
        visible = self._masks.get((queries, keys, sinks, dtype))
        if visible is None:
            hidden = ~self._visible(queries, keys)
            columns = sinks + keys
            rows = torch.zeros(queries, columns + -columns % _ALIGNMENT, dtype=dtype, device=self.device)
            visible = rows[:, :columns]
            visible[:, sinks:].masked_fill_(hidden, -torch.inf)
            self._masks[queries, keys, sinks, dtype] = visible
        return visible

    def _visible(self, queries: int, keys: int) -> Tensor:
        """Return which keys each of the last queries sees, bool [queries, keys]."""
        mask: Tensor = sdpa_mask(
            batch_size=1,
            q_length=queries,
            kv_length=keys,
            q_offset=keys - queries,
            mask_function=self.function,
            allow_is_causal_skip=False,
            use_vmap=self.by_element,
            device=self.device,
        )[0, 0]
        return mask


def mask_rule(
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_sizes: Any,
) -> MaskRule | None:
    """Return the mask rule of a kind of layers; None if every earlier token is visible.

    transformers calls this in place of its own mask functions (`AttentionMaskInterface`). `local_size` is the
    size of a window or chunk. Without `allow_is_causal_skip`, another function also changes the mask: even
    short sequences may hide earlier keys.
    """
    if mask_function is causal_mask_function:
        return None
    reach = local_size if allow_is_causal_skip else None
    return MaskRule(mask_function, reach, use_vmap, torch.device(device))


@dataclass(frozen=True)
class Scores:
    """How a layer computes its attention scores, the inputs of softmax."""

    scale: float | None = None  # factor of query-key products; None: 1 / sqrt(dim)
    rule: MaskRule | None = None  # which keys are visible; None: every earlier key
    window: int | None = None  # the layer's sliding window, in tokens
    softcap: float | None = None  # products x become softcap * tanh(x / softcap)
    sinks: Tensor | None = None  # [heads], the score of a key with value 0 that every query sees

    def factor(self, query: Tensor) -> float:
        """Return the factor of query-key products."""
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class ImageRuns:
    """Runs of image tokens whose queries see all keys up to the end of their run."""

    # In the own tokens of each segment: first token, and the one after the last.
    places: tuple[tuple[tuple[int, int], ...], ...]
    in_windows_only: bool  # only in layers with a sliding window

    def of_layer(self, scores: Scores) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Return `places`, each empty if this layer's image tokens see earlier tokens only."""
        is_causal = self.in_windows_only and scores.window is None
        return ((),) * len(self.places) if is_causal else self.places


def pieces(tokens: int, runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """Yield the pieces of a segment's own tokens: first, the one after the last, and whether it is an image.

    The queries of a piece see the keys of their row up to the piece's end.
    """
    edges = [0, *itertools.chain.from_iterable(runs), tokens]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        if start < stop:
            yield start, stop, number % 2 == 1


@dataclass
class SegmentAttention:
    """Packed attention by one SDPA call per segment."""

    segments: Sequence[Segment]
    device: torch.device
    runs: ImageRuns | None = None
    _image_rules: dict[int | None, MaskRule] = field(default_factory=dict, init=False)

    @cached_property
    def _pieces(self) -> tuple[list[int], list[list[int]]]:
        """Return the lengths of the pieces into which keys are cut, and the pieces of each segment's row."""
        parts = [np.array(path, dtype=np.int64).reshape(-1, 2) for path in paths(self.segments)]
        edges = np.unique(np.concatenate(parts))
        pieces: list[list[int]] = []
        for part in parts:
            spans = np.searchsorted(edges, part)
            pieces.append([*itertools.chain.from_iterable(range(*span) for span in spans)])
        return np.diff(edges).tolist(), pieces

    @cached_property
    def _causal(self) -> MaskRule:
        return MaskRule(causal_mask_function, None, False, self.device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """See `kernels.PackedAttention`."""
        # `split`, not slices: the backward of each slice would write a zero tensor of full size.
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        own_tokens = [segment.own for segment in self.segments]
        owns = zip(*(torch.split(tensor, own_tokens, dim=1) for tensor in (query, key, value)), strict=True)
        lengths, pieces_of = self._pieces
        keys, values = (torch.split(tensor, lengths, dim=1) for tensor in (key, value))
        runs = [()] * len(self.segments) if self.runs is None else self.runs.of_layer(scores)
        outputs = []
        for segment, own, numbers, places in zip(self.segments, owns, pieces_of, runs, strict=True):
            attend = self._attend_pieces if places else self._attend
            own_query, row_key, row_value = own
            if segment.shared:
                row_key, row_value = (torch.cat([part[n] for n in numbers], dim=1) for part in (keys, values))
            outputs.append(attend(own_query, row_key, row_value, scores, *places))
        # Contiguous: some models join the heads by a view, which would fail.
        return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()

    def _attend_pieces(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Scores, *runs: tuple[int, int]
    ) -> Tensor:
        """Return the attention [heads, tokens, dim] of a segment with these runs of image tokens."""
        shared = key.shape[1] - query.shape[1]
        # As in transformers' own masks, a window limits what an image's queries see before them only.
        reach = None if scores.rule is None else scores.rule.reach
        in_images = replace(
            scores, rule=self._image_rules.setdefault(reach, _whole_images(reach, self.device))
        )
        outputs = list[Tensor]()
        for start, stop, is_image in pieces(query.shape[1], runs):
            own_scores = in_images if is_image else scores
            seen = slice(shared + stop)
            outputs.append(self._attend(query[:, start:stop], key[:, seen], value[:, seen], own_scores))
        return torch.cat(outputs, dim=1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Return one segment's attention [heads, tokens, dim]; the queries are its last tokens."""
        tokens, length, dim = query.shape[1], key.shape[1], value.shape[-1]
        if tokens == 0:
            return query.new_empty(query.shape[0], 0, dim)
        rule = self._causal if scores.rule is None or scores.rule.is_causal(length) else scores.rule
        scale = scores.factor(query)
        if scores.softcap is not None:
            wide = torch.promote_types(query.dtype, torch.float32)
            inputs = (query, key, value, rule.mask(tokens, length, wide), scale, scores.softcap)
            # Backward computes the scores again, so that only one segment's scores are in memory.
            attended: Tensor = checkpoint(_capped, *inputs, use_reentrant=False, preserve_rng_state=False)
            return attended
        if not query.is_cuda and query.dtype is torch.bfloat16 and length <= _CPU_FLOAT32_KEYS:
            return self._attend(query.float(), key.float(), value.float(), scores).to(query.dtype)
        if not query.is_cuda:  # the CPU kernel stores all scores if values have another dimension
            query, key, value = with_one_dim(query, key, value)
        if scores.sinks is not None:
            query, key, value = _with_sink(query, key, value, scores.sinks / scale)
        if rule is not self._causal or tokens < length:
            mask = rule.mask(tokens, length, query.dtype, int(scores.sinks is not None))
            return _attend(query, key, value, mask, scale)[..., :dim]
        if scores.sinks is not None:  # causal SDPA needs a query for each key: one more for the sink
            query = pad(query, (0, 0, 1, 0))
        return _attend(query, key, value, None, scale)[:, -tokens:, :dim]


def _whole_images(reach: int | None, device: torch.device) -> MaskRule:
    """Return the rule of queries that see every key, but none that is `reach` or more tokens before."""
    limit = torch.inf if reach is None else reach

    def visible(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return key > query - limit

    return MaskRule(visible, None, False, device)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of queries [heads, n, dim]: causal without a mask, with one query for each key."""
    groups = query.shape[0] // key.shape[0]
    # Every CUDA kernel that accepts grouped heads here would store all scores.
    stores_scores = query.is_cuda and (mask is not None or query.dtype is torch.float32)
    if groups > 1 and stores_scores:
        key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
    return scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )[0]


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Return attention [heads, n, value dim] with capped scores, which are float32 or wider."""
    groups = query.shape[0] // key.shape[0]
    key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
    products = (query @ key.transpose(1, 2)).to(mask.dtype)
    scores = softcap * torch.tanh(products * (scale / softcap)) + mask
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def with_one_dim(query: Tensor, key: Tensor, value: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
    """Return the tensors zero-padded to one head dimension, which is a multiple of `multiple`."""
    dim = max(query.shape[-1], value.shape[-1])
    dim += -dim % multiple
    missing = [dim - tensor.shape[-1] for tensor in (query, key, value)]
    # Padding by 0 would copy a tensor.
    return tuple(pad(t, (0, n)) if n else t for t, n in zip((query, key, value), missing, strict=True))


def _with_sink(query: Tensor, key: Tensor, value: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors with a sink as the first key, whose product with every query is `products` [heads].

    A further dimension holds `products` in queries, 1 in the sink and 0 in other keys.
    """
    heads, tokens, dim = query.shape
    added = pad(products.to(query.dtype)[:, None, None].expand(heads, tokens, 1), (0, _SINK_DIMS - 1))
    sink = key.new_zeros(key.shape[0], 1, dim + _SINK_DIMS)
    sink[..., dim] = 1
    return (
        torch.cat((query, added), dim=-1),
        torch.cat((sink, pad(key, (0, _SINK_DIMS))), dim=1),
        pad(value, (0, _SINK_DIMS, 1, 0)),
    )
