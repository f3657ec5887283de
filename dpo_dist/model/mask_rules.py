"""The keys that a layer's queries see: a rule over positions, evaluated one segment at a time.

A transformers model creates a mask for each kind of its layers (full, sliding, chunked, or its own) from a
function of query and key positions. Under packed attention it gets this rule instead of a mask of
[tokens, tokens]. Every response with its prompt is a sequence from position 0, so the rule is exact for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dpo_dist.errors import ConfigError
from dpo_dist.model.blocks import Block

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
