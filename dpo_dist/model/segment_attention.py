"""Packed attention by PyTorch's own products, one segment at a time; runs everywhere.

A segment is the queries of one response, with those of the prompt for the first response, and their keys:
the prompt and the response. Where a layer's rule limits the reach, or scores are capped, a segment is cut
into blocks of queries, so that neither time nor memory grow with the square of its length.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from dpo_dist.model.mask_rules import MaskRule, causal_rule

Layout = tuple[tuple[int, ...], ...]

# Queries of a block under a window: smaller blocks see fewer keys outside of the window, in more calls.
_SMALLEST_BLOCK = 128
_BLOCKS_PER_REACH = 4
# Float32 scores of a block, where they are capped.
_SCORE_BYTES = 64 * 2**20
# Dimensions added for a sink: kernels want multiples of 8.
_SINK_DIMS = 8


@dataclass(frozen=True)
class Scores:
    """The scores of a layer, from which softmax computes the weights of keys.

    Attributes:
        scale: of the products of queries and keys; None: 1 / sqrt(dim).
        rule: which keys are visible; None: all that are not later.
        window: the sliding window that the layer names beside its rule, in tokens.
        softcap: products x become softcap * tanh(x / softcap); None: unchanged.
        sinks: [heads], the score of a key with value 0 that every query sees; None: there is none.
    """

    scale: float | None = None
    rule: MaskRule | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass
class SegmentAttention:
    """Attention of a micro-batch of this layout, for all layers."""

    layout: Layout
    device: torch.device

    @cached_property
    def _query_lengths(self) -> list[int]:
        return [n for prompt, first, *rest in self.layout for n in (prompt + first, *rest)]

    @cached_property
    def _key_lengths(self) -> list[int]:
        return [length for pair in self.layout for length in pair]

    @cached_property
    def _causal(self) -> MaskRule:
        return causal_rule(self.device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """See `attention.PackedAttention`."""
        # `split`, not slices: the backward of each slice would write a zero tensor of full size.
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        queries = iter(torch.split(query, self._query_lengths, dim=1))
        first_keys = iter(torch.split(key, self._query_lengths, dim=1))
        first_values = iter(torch.split(value, self._query_lengths, dim=1))
        keys = iter(torch.split(key, self._key_lengths, dim=1))
        values = iter(torch.split(value, self._key_lengths, dim=1))
        outputs = []
        for _, _, *rest in self.layout:
            outputs.append(self._attend(next(queries), next(first_keys), next(first_values), scores))
            prompt_key, prompt_value = next(keys), next(values)
            next(keys), next(values)
            for _ in rest:
                next(first_keys), next(first_values)
                own_key = torch.cat((prompt_key, next(keys)), dim=1)
                own_value = torch.cat((prompt_value, next(values)), dim=1)
                outputs.append(self._attend(next(queries), own_key, own_value, scores))
        # Contiguous, as models expect that join the heads by a view.
        return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Return the attention of one segment: [heads, tokens, dim], the queries are the last tokens."""
        tokens, length = query.shape[1], key.shape[1]
        if tokens == 0:
            return query[..., : value.shape[-1]]
        rule = None if scores.rule is None or scores.rule.is_causal(length) else scores.rule
        if rule is None and scores.softcap is None:
            mask = (
                None if tokens == length else self._causal.mask(range(length - tokens, length), range(length))
            )
            return _attend(query, key, value, mask, scores)
        return _attend_in_blocks(query, key, value, rule or self._causal, scores)


def _attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, rule: MaskRule, scores: Scores) -> Tensor:
    """Return the attention of one segment, a block of queries over the keys within reach at a time.

    Positions are cut at multiples of one size, and a block's keys are whole pieces of that size.
    """
    length = key.shape[1]
    first = length - query.shape[1]
    size = _block_size(query.shape[0], length, rule.reach, scores.softcap is not None)
    cuts = [*range(first - first % size, length, size), length]
    spans = [range(max(start, first), stop) for start, stop in pairwise(cuts)]
    pieces = [min(size, length - start) for start in range(0, length, size)]
    key_pieces, value_pieces = torch.split(key, pieces, dim=1), torch.split(value, pieces, dim=1)
    outputs = []
    for span, block in zip(spans, torch.split(query, [len(span) for span in spans], dim=1), strict=True):
        earliest = 0 if rule.reach is None else max(0, span.start - rule.reach + 1) // size
        seen = slice(earliest, span.start // size + 1)
        mask = rule.mask(span, range(earliest * size, span.stop))
        block_key = torch.cat(key_pieces[seen], dim=1)
        block_value = torch.cat(value_pieces[seen], dim=1)
        if scores.softcap is None:
            outputs.append(_attend(block, block_key, block_value, mask, scores))
        elif len(spans) == 1:
            outputs.append(_attend_capped(block, block_key, block_value, mask, scores))
        else:  # the scores of one block at a time, in backward too
            outputs.append(_recomputed(_attend_capped, block, block_key, block_value, mask, scores))
    return torch.cat(outputs, dim=1)


def _block_size(heads: int, keys: int, reach: int | None, is_capped: bool) -> int:
    size = keys if reach is None else max(_SMALLEST_BLOCK, reach // _BLOCKS_PER_REACH)
    if is_capped:
        size = min(size, max(1, _SCORE_BYTES // (4 * heads * keys)))
    return size


def _recomputed(function: Any, *inputs: Any) -> Tensor:
    output: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Return the attention of queries [heads, n, dim]; without a mask they are the keys' own tokens."""
    scale, dim = scores.scale, value.shape[-1]
    if scores.sinks is not None:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key, value = _with_sink(query, key, value, scores.sinks / scale)
        if mask is None:  # a query before the others, which sees the sink only, keeps the mask square
            query = pad(query, (0, 0, 1, 0))
        else:
            mask = pad(mask, (1, 0), value=True)
    if mask is not None and query.is_cuda and query.shape[0] != key.shape[0]:
        # With both a mask and groups of heads, CUDA has no kernel that never stores all scores.
        groups = query.shape[0] // key.shape[0]
        key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
    attended = scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )[0]
    if scores.sinks is None:
        return attended
    return attended[:, 1:, :dim] if mask is None else attended[..., :dim]


def _with_sink(query: Tensor, key: Tensor, value: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors with a sink as the first key: its product with each query is `products` [heads].

    Queries have `products` in a further dimension, in which the sink has 1 and other keys have 0.
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


def _attend_capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Return attention with capped scores; softmax is float32, as in the models' own attention."""
    assert scores.softcap is not None
    heads, tokens, dim = query.shape
    scale = dim**-0.5 if scores.scale is None else scores.scale
    grouped = query.reshape(key.shape[0], -1, dim)
    products = grouped @ key.transpose(1, 2) * scale
    capped = torch.tanh(products / scores.softcap) * scores.softcap
    capped = capped.view(key.shape[0], -1, tokens, key.shape[1]).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(capped, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights.flatten(1, 2) @ value).view(heads, tokens, value.shape[-1])
