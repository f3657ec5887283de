"""Attention with capped scores (Gemma 2), a block of queries at a time; no block's scores are kept.

Scores are x = softcap * tanh(s / softcap), s = scale * query @ key. The backward computes the weights p again
and, as FlashAttention (arXiv 2205.14135), has dx = p * (dp - sum(output * d output)), then
ds = dx * (1 - tanh^2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_dist.model.blocks import Block

# Float32 scores of a block: on a CPU they stay in its cache.
_CPU_SCORE_BYTES = 2 * 2**20
_GPU_SCORE_BYTES = 64 * 2**20


def capped_block_size(query: Tensor, keys: int) -> int:
    """Return the number of queries [heads, tokens, dim] in a block that sees so many keys."""
    limit = _CPU_SCORE_BYTES if query.device.type == "cpu" else _GPU_SCORE_BYTES
    return max(1, limit // (4 * query.shape[0] * keys))


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    mask: Callable[[Block], Tensor],
    scale: float,
    softcap: float,
) -> Tensor:
    """Return [heads, queries, value dim]; scores and softmax are float32 or wider.

    Args:
        query: [heads, queries, dim], the last tokens of a sequence.
        key: [key heads, tokens, dim].
        value: [key heads, tokens, value dim].
        blocks: of the queries.
        mask: returns a block's mask [queries, keys], which is added to its scores.
        scale: of the products of queries and keys.
        softcap: of the scores.
    """
    options = (blocks, mask, scale, softcap)
    attended: Tensor = _Capped.apply(query, key, value, *options)  # type: ignore[no-untyped-call]
    return attended


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Sequence[Block],
        mask: Callable[[Block], Tensor],
        scale: float,
        softcap: float,
    ) -> Tensor:
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for block, of_queries, of_keys in _slices(query, key, blocks):
            tanh = _tanh(_grouped(query[:, of_queries], key), key[:, of_keys], scale / softcap)
            weights = _weights(tanh.mul_(softcap), mask(block), query.dtype)
            output[:, of_queries] = (weights @ value[:, of_keys]).view(len(query), len(block.queries), -1)
        ctx.save_for_backward(query, key, value, output)
        ctx.options = (blocks, mask, scale, softcap)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        blocks, mask, scale, softcap = ctx.options
        wide = torch.promote_types(query.dtype, torch.float32)
        query_grad = torch.empty_like(query)
        key_grad, value_grad = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for block, of_queries, of_keys in _slices(query, key, blocks):
            block_query, block_grad = (_grouped(tensor[:, of_queries], key) for tensor in (query, grad))
            inner = (grad[:, of_queries].to(wide) * output[:, of_queries]).sum(-1, keepdim=True)
            tanh = _tanh(block_query, key[:, of_keys], scale / softcap)
            weights = _weights(tanh * softcap, mask(block), wide)
            value_grad[:, of_keys] += weights.to(query.dtype).transpose(1, 2) @ block_grad
            products = (block_grad @ value[:, of_keys].transpose(1, 2)).to(wide)
            products.sub_(_grouped(inner, key)).mul_(weights).mul_(scale)
            products.mul_(tanh.square_().neg_().add_(1))
            slopes = products.to(query.dtype)
            query_grad[:, of_queries] = (slopes @ key[:, of_keys]).view_as(query_grad[:, of_queries])
            key_grad[:, of_keys] += slopes.transpose(1, 2) @ block_query
        return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype), None, None, None, None


def _slices(query: Tensor, key: Tensor, blocks: Sequence[Block]) -> list[tuple[Block, slice, slice]]:
    """Return for each block the indices of its queries and of its keys."""
    first = key.shape[1] - query.shape[1]
    return [
        (
            block,
            slice(block.queries.start - first, block.queries.stop - first),
            slice(block.keys.start, block.keys.stop),
        )
        for block in blocks
    ]


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """Return [key heads, heads of a group * queries, dim] of a tensor [heads, queries, dim]."""
    return tensor.reshape(len(key), -1, tensor.shape[-1])


def _tanh(query: Tensor, key: Tensor, factor: float) -> Tensor:
    products = query @ key.transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return products.to(wide).mul_(factor).tanh_()


def _weights(scores: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the softmax of scores [key heads, heads of a group * queries, keys] that it changes."""
    scores.view(len(scores), -1, *mask.shape).add_(mask)
    return torch.softmax(scores, dim=-1).to(dtype)
