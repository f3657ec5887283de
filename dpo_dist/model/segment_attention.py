"""Packed attention by PyTorch's own products, one segment at a time; runs everywhere.

A segment is the queries of one response, with those of the prompt for the first response, and their keys:
the prompt and the response. Where a layer's rule limits the reach, or scores are capped, a segment is cut
into blocks of queries, so that neither time nor memory grow with the square of its length. Blocks also keep
the masks of responses small that follow a shared prompt.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from dpo_dist.model.blocks import Block, cut_in_blocks
from dpo_dist.model.capped_attention import capped_attention, capped_block_size
from dpo_dist.model.mask_rules import ALIGNMENT, MaskRule, causal_rule

Layout = tuple[tuple[int, ...], ...]

# Queries of a block under a window: smaller blocks see fewer keys outside of the window, in more calls.
_SMALLEST_BLOCK = 128
_BLOCKS_PER_REACH = 4
# Queries of a block without a window, after a prompt: its mask is [queries, keys].
_FULL_BLOCK = 512
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
        tokens, length, dim = query.shape[1], key.shape[1], value.shape[-1]
        if tokens == 0:
            return query.new_empty(query.shape[0], 0, dim)
        rule = self._causal if scores.rule is None or scores.rule.is_causal(length) else scores.rule
        scale = query.shape[-1] ** -0.5 if scores.scale is None else scores.scale
        if scores.softcap is not None:
            return _attend_capped(query, key, value, rule, scores)
        query, key, value = _of_one_dim(query, key, value)
        if scores.sinks is not None:
            query, key, value = _with_sink(query, key, value, scores.sinks / scale)
        if rule.is_full and tokens == length:
            if scores.sinks is not None:  # a query before the others, which sees the sink only
                query = pad(query, (0, 0, 1, 0))
            return _attend(query, key, value, None, scale)[:, -tokens:, :dim]
        return _attend_in_blocks(query, key, value, rule, scores, scale)[..., :dim]


def _attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, rule: MaskRule, scores: Scores, scale: float
) -> Tensor:
    """Return the attention of one segment, a block of queries over the keys within reach at a time."""
    sinks = 0 if scores.sinks is None else 1
    length = key.shape[1] - sinks
    if query.is_cuda and query.shape[0] != key.shape[0]:
        # With both a mask and groups of heads, CUDA has no kernel that never stores all scores.
        groups = query.shape[0] // key.shape[0]
        key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
    size = _block_size(query.shape[1], length, rule)
    blocks = cut_in_blocks(range(length - query.shape[1], length), size, rule.reach)
    pieces = [sinks, *(min(size, length - start) for start in range(0, length, size))]
    key_pieces, value_pieces = torch.split(key, pieces, dim=1), torch.split(value, pieces, dim=1)
    is_window = scores.window == rule.reach
    outputs = []
    for block, queries in zip(
        blocks, torch.split(query, [len(block.queries) for block in blocks], dim=1), strict=True
    ):
        mask = rule.mask(block, length, query.dtype, is_window, sinks)
        if rule.reach is None:
            stop = sinks + block.keys.stop
            block_key, block_value = key[:, :stop], value[:, :stop]
        else:  # copies of the keys within reach: the backward of a slice writes all keys
            within = slice(1 + block.keys.start // size, 2 + block.start // size)
            block_key = torch.cat((key_pieces[0], *key_pieces[within]), dim=1)
            block_value = torch.cat((value_pieces[0], *value_pieces[within]), dim=1)
        outputs.append(_attend(queries, block_key, block_value, mask, scale))
    return torch.cat(outputs, dim=1)


def _block_size(queries: int, length: int, rule: MaskRule) -> int:
    if rule.reach is not None:
        return max(_SMALLEST_BLOCK, rule.reach // (_BLOCKS_PER_REACH * ALIGNMENT) * ALIGNMENT)
    if not rule.is_full:
        return length
    # Powers of two: responses of similar lengths share a mask.
    return min(_FULL_BLOCK, max(ALIGNMENT, 1 << (queries - 1).bit_length()))


def _attend_capped(query: Tensor, key: Tensor, value: Tensor, rule: MaskRule, scores: Scores) -> Tensor:
    assert scores.softcap is not None
    length = key.shape[1]
    size = min(_block_size(query.shape[1], length, rule), capped_block_size(query, length))
    blocks = cut_in_blocks(range(length - query.shape[1], length), size, rule.reach)
    scale = query.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    wide = torch.promote_types(query.dtype, torch.float32)
    is_window = scores.window == rule.reach

    def mask(block: Block) -> Tensor:
        return rule.mask(block, length, wide, is_window)

    return capped_attention(query, key, value, blocks, mask, scale, scores.softcap)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of queries [heads, n, dim]; without a mask they are the keys' own tokens."""
    return scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )[0]


def _of_one_dim(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors with zeros in further dimensions, where values have others than keys.

    Of other dimensions, PyTorch would store all scores on a CPU.
    """
    dim = max(query.shape[-1], value.shape[-1])
    if query.is_cuda or query.shape[-1] == value.shape[-1]:
        return query, key, value
    query, key, value = (pad(tensor, (0, dim - tensor.shape[-1])) for tensor in (query, key, value))
    return query, key, value


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
