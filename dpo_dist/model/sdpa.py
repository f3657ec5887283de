"""Packed attention by PyTorch's own products, one segment at a time, under any rule of visible keys."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dpo_dist.foundation.errors import ConfigError


@dataclass(frozen=True)
class Block:
    """Some queries of a sequence and the keys that they may see, as positions.

    Attributes:
        size: of a whole block.
        queries: consecutive, in one interval between multiples of `size`.
        keys: from a multiple of `size` to the last query.
    """

    size: int
    queries: range
    keys: range

    @property
    def start(self) -> int:
        """Position of the first query of the whole block."""
        return self.queries.start - self.queries.start % self.size


def cut_in_blocks(queries: range, size: int, reach: int | None) -> list[Block]:
    """Return the blocks of these queries, the last tokens of a sequence.

    Args:
        queries: positions.
        size: of a block.
        reach: a query at position p sees no key at p - reach or before; None: it may see all keys before it.
    """
    blocks = []
    for start in range(queries.start - queries.start % size, queries.stop, size):
        own = range(max(start, queries.start), min(start + size, queries.stop))
        earliest = 0 if reach is None else max(0, own.start - reach + 1)
        blocks.append(Block(size, own, range(earliest - earliest % size, own.stop)))
    return blocks


ALIGNMENT = 16
"""Masks begin at multiples of so many elements of their tensor: PyTorch's kernels on CUDA refuse others."""


@dataclass(eq=False)
class MaskRule:
    """A causal rule, shared by all layers of one kind in one forward.

    Attributes:
        function: of transformers: (batch, head, query position, key position) to whether the key is visible.
        reach: a query at position p sees no key at p - reach or before, and with at most `reach` keys it sees
            all that are not later; it sees the same if all positions move by `reach`. None: not known.
        by_element: the function takes one pair of positions at a time.
        device: of the masks.
    """

    function: Callable[..., Any]
    reach: int | None
    by_element: bool
    device: torch.device
    _masks: dict[Any, Tensor] = field(default_factory=dict, init=False)

    @property
    def is_full(self) -> bool:
        """Whether all earlier tokens are visible in every sequence."""
        return self.function is causal_mask_function

    def __getitem__(self, selected: tuple[slice, ...]) -> "MaskRule":
        """Return this rule for a selection of all queries and keys, as Gemma 4 takes one of its masks.

        Raises:
            IndexError: the selection is a part of them.
        """
        if any(part not in (slice(None), slice(0, None)) for part in selected):
            raise IndexError(f"packed attention has no part {selected} of a mask")
        return self

    def is_causal(self, keys: int) -> bool:
        """Return whether all earlier tokens are visible in a sequence of this length."""
        return self.reach is not None and keys <= self.reach

    def mask(
        self, block: Block, longest: int, dtype: torch.dtype, is_window: bool = False, sinks: int = 0
    ) -> Tensor:
        """Return the mask [queries, sinks + keys] of a block: 0 where a key is visible, -inf elsewhere.

        It is a view of a tensor that blocks and layers share. If the size of the block and the rows of this
        tensor are multiples of `ALIGNMENT`, it begins at one.

        Args:
            block: of a sequence.
            longest: the length of the sequence.
            dtype: of the mask.
            is_window: whether it is known that the rule is a sliding window.
            sinks: number of keys before the others that every query sees.

        Raises:
            ConfigError: a query sees a later key.
        """
        before = block.start - block.keys.start
        rows = slice(block.queries.start - block.start, block.queries.stop - block.start)
        columns = sinks + len(block.keys)
        if self.is_full or (is_window and self.reach and not sinks):
            far = self._farthest(block.size, longest, sinks, dtype)
            first = far.shape[1] - block.size - before - sinks
            return far[rows, first : first + columns]
        if self.reach is None:
            return self._evaluated(block.queries, block.keys, sinks, dtype)
        period = 1 if is_window else self.reach
        moved = block.keys.start - block.keys.start % period
        start, first = block.start - moved, block.keys.start - moved
        queries, keys = range(start, start + block.size), range(first, start + block.size)
        return self._evaluated(queries, keys, sinks, dtype)[rows, :columns]

    def _farthest(self, size: int, longest: int, sinks: int, dtype: torch.dtype) -> Tensor:
        """Return the mask of a late block; the last columns of its keys are the mask of any earlier one."""
        if self.reach is not None:
            start = size * -(-(self.reach - 1) // size)
            return self._evaluated(range(start, start + size), range(start + size), 0, dtype)
        known = self._masks.get((size, sinks, dtype))
        if known is None or known.shape[1] < sinks + longest + size:
            before = sinks + -(-longest // ALIGNMENT) * ALIGNMENT
            known = torch.full((size, before + size), -torch.inf, dtype=dtype, device=self.device)
            known = known.triu_(before + 1)
            self._masks[size, sinks, dtype] = known
        return known

    def _evaluated(self, queries: range, keys: range, sinks: int, dtype: torch.dtype) -> Tensor:
        known = self._masks.get((queries, keys, sinks, dtype))
        if known is None:
            visible = self._evaluate(queries, keys)
            known = torch.zeros(visible.shape, dtype=dtype, device=self.device)
            known = pad(known.masked_fill_(~visible, -torch.inf), (sinks, 0))
            self._masks[queries, keys, sinks, dtype] = known
        return known

    def _evaluate(self, queries: range, keys: range) -> Tensor:
        """Return bool [queries, keys] of positions in one sequence."""
        mask: Tensor = sdpa_mask(
            batch_size=1,
            q_length=len(queries),
            kv_length=len(keys),
            q_offset=queries.start,
            kv_offset=keys.start,
            mask_function=self.function,
            allow_is_causal_skip=False,
            use_vmap=self.by_element,
            device=self.device,
        )[0, 0]
        # Rules of known reach are causal by construction: they need no synchronization with the device.
        if self.reach is None:
            later = torch.ones_like(mask).triu(queries.start - keys.start + 1)
            if bool((mask & later).any()):
                raise not_causal("a layer's attention mask")
        return mask


def causal_rule(device: torch.device) -> MaskRule:
    """Return the rule of a layer in which tokens see all earlier tokens."""
    return MaskRule(causal_mask_function, None, False, device)


def not_causal(got: str) -> ConfigError:
    """Return the error for a model whose tokens attend to later tokens."""
    return ConfigError(
        "this model is not causal: its tokens attend to later tokens",
        where="model.path",
        got=got,
        remedy="choose a causal language model",
    )


def mask_rule(
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_sizes: Any,
) -> MaskRule | None:
    """Return the rule of a kind of layers; None if its tokens see all earlier tokens.

    Called by transformers in the place of its mask functions (`AttentionMaskInterface`).

    Args:
        mask_function: over positions.
        local_size: of a window or a chunk.
        allow_is_causal_skip: whether the function is transformers' own causal one, with at most a window or
            chunks.
        use_vmap: whether the function takes one pair of positions at a time.
        device: of the model's inputs.
    """
    if mask_function is causal_mask_function:
        return None
    reach = local_size if allow_is_causal_skip else None
    return MaskRule(mask_function, reach, use_vmap, torch.device(device))


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
