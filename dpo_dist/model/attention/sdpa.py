"""Packed attention by PyTorch's products, one segment at a time, under any rule of visible keys.

A segment is a prompt with its first response, or a later response after its prompt; a mask is of one segment.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import causal_mask_function, sdpa_mask

Layout = tuple[tuple[int, ...], ...]
"""For each example the lengths of its pieces: prompt, response, response, ..."""

# Rows of a mask begin at multiples of so many elements; else PyTorch's CUDA kernels copy it.
_ALIGNMENT = 16
# Dimensions added for a sink: kernels want multiples of 8.
_SINK_DIMS = 8
# Up to this many keys in a segment, PyTorch's CPU kernel is slower in bf16 than in float32.
_CPU_FLOAT32_KEYS = 256


@dataclass(eq=False)
class MaskRule:
    """A causal rule, shared by all layers of one kind in one forward.

    With at most `reach` keys, those of a sliding window or a chunk, a query sees all that are not later.
    """

    function: Callable[..., Any]  # transformers': batch, head, query position, key position to visible
    reach: int | None  # None: not known
    by_element: bool  # the function takes one pair of positions at a time
    device: torch.device
    _masks: dict[Any, Tensor] = field(default_factory=dict, init=False)

    def __getitem__(self, selected: tuple[slice, ...]) -> "MaskRule":
        """Return this rule for a selection of all queries and keys, as Gemma 4 takes one of its masks."""
        if any(part not in (slice(None), slice(0, None)) for part in selected):
            raise IndexError(f"packed attention has no part {selected} of a mask")
        return self

    def is_causal(self, keys: int) -> bool:
        """Return whether all earlier tokens are visible in a sequence of this length."""
        return self.function is causal_mask_function or (self.reach is not None and keys <= self.reach)

    def mask(self, queries: int, keys: int, dtype: torch.dtype, sinks: int = 0) -> Tensor:
        """Return the mask [queries, sinks + keys] of the last tokens, 0 where a key is visible, else -inf.

        Every query sees the sinks. Layers share it.
        """
        known = self._masks.get((queries, keys, sinks, dtype))
        if known is None:
            hidden = ~self._visible(queries, keys)
            columns = sinks + keys
            rows = torch.zeros(queries, columns + -columns % _ALIGNMENT, dtype=dtype, device=self.device)
            known = rows[:, :columns]
            known[:, sinks:].masked_fill_(hidden, -torch.inf)
            self._masks[queries, keys, sinks, dtype] = known
        return known

    def _visible(self, queries: int, keys: int) -> Tensor:
        """Return bool [queries, keys]."""
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
    """Return the rule of a kind of layers; None if its tokens see all earlier tokens.

    Called by transformers in the place of its mask functions (`AttentionMaskInterface`): `local_size` is of a
    window or a chunk, `allow_is_causal_skip` of transformers' own rules, which have at most one of them.
    """
    if mask_function is causal_mask_function:
        return None
    reach = local_size if allow_is_causal_skip else None
    return MaskRule(mask_function, reach, use_vmap, torch.device(device))


@dataclass(frozen=True)
class Scores:
    """The scores of a layer, from which softmax computes the weights of keys."""

    scale: float | None = None  # of the products of queries and keys; None: 1 / sqrt(dim)
    rule: MaskRule | None = None  # which keys are visible; None: all that are not later
    window: int | None = None  # the sliding window that the layer names beside its rule, in tokens
    softcap: float | None = None  # products x become softcap * tanh(x / softcap)
    sinks: Tensor | None = None  # [heads], the score of a key with value 0 that every query sees


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
        return MaskRule(causal_mask_function, None, False, self.device)

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
            wide = torch.promote_types(query.dtype, torch.float32)
            given = (query, key, value, rule.mask(tokens, length, wide), scale, scores.softcap)
            # Scores are computed again in backward: one segment's are in memory at a time.
            attended: Tensor = checkpoint(_capped, *given, use_reentrant=False, preserve_rng_state=False)
            return attended
        if not query.is_cuda and query.dtype is torch.bfloat16 and length <= _CPU_FLOAT32_KEYS:
            return self._attend(query.float(), key.float(), value.float(), scores).to(query.dtype)
        if not query.is_cuda:  # a CPU would store all scores if values have another dimension
            query, key, value = with_one_dim(query, key, value)
        if scores.sinks is not None:
            query, key, value = _with_sink(query, key, value, scores.sinks / scale)
        if rule is not self._causal or tokens < length:
            mask = rule.mask(tokens, length, query.dtype, 0 if scores.sinks is None else 1)
            return _attend(query, key, value, mask, scale)[..., :dim]
        if scores.sinks is not None:  # a query before the others, which sees the sink only
            query = pad(query, (0, 0, 1, 0))
        return _attend(query, key, value, None, scale)[:, -tokens:, :dim]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of queries [heads, n, dim]; without a mask they are the keys' own tokens."""
    groups = query.shape[0] // key.shape[0]
    if query.is_cuda and groups > 1 and (mask is not None or query.dtype is torch.float32):
        # With groups of heads, every CUDA kernel for these would store all scores.
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
    """Return the attention [heads, n, value dim] of capped scores, in float32 or wider."""
    groups = query.shape[0] // key.shape[0]
    key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
    products = (query @ key.transpose(1, 2)).to(mask.dtype)
    scores = softcap * torch.tanh(products * (scale / softcap)) + mask
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def with_one_dim(query: Tensor, key: Tensor, value: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
    """Return the tensors padded with zeros to one head dimension, a multiple of this number."""
    dim = max(query.shape[-1], value.shape[-1])
    dim += -dim % multiple
    missing = [dim - tensor.shape[-1] for tensor in (query, key, value)]
    # A pad by 0 would be a copy.
    return tuple(pad(t, (0, n)) if n else t for t, n in zip((query, key, value), missing, strict=True))


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
