"""Recurrent layers on a packed sequence: each node of the tree of states starts in its parent's state."""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from dpo_dist.batching.pack import copy_to_device
from dpo_dist.batching.prefix_tree import Segment
from dpo_dist.batching.state_tree import StateNode, state_nodes, with_contexts

# torch's rules compute chunks of at least this many tokens: up to it, padding costs nothing.
_CHUNK = 64

Step = Callable[[list[Tensor], Tensor | None, bool], tuple[Tensor, Tensor | None]]
"""Map inputs [nodes, tokens, ...] and states [nodes, ...] to outputs and, if asked for, the last states."""


class _Group:
    """Nodes of one level that are computed by one call, padded to the longest."""

    def __init__(self, members: Sequence[int], nodes: Sequence[StateNode], device: torch.device):
        self.members = members
        self.parents = [nodes[member].parent for member in members]
        spans = [np.arange(nodes[member].start, nodes[member].stop) for member in members]
        tokens = np.full((len(members), max(map(len, spans))), -1)
        for row, span in zip(tokens, spans, strict=True):
            row[: len(span)] = span
        self.shape = tokens.shape
        self.is_token = tokens.ravel() >= 0
        padding = nodes[-1].stop  # the index behind the last token, where inputs are 0
        self.rows = copy_to_device(device, np.where(tokens < 0, padding, tokens).ravel())


class ForkedStates:
    """The tree of states of one micro-batch, shared by all layers of a forward (`packed_states`).

    The state at the end of a node is the initial state of its children, and the gradient flows back through
    it, so that each token is computed once, as in attention.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device):
        self._segments, self._device = segments, device
        self._contexts: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def _nodes(self) -> list[StateNode]:
        return state_nodes(self._segments)

    @cached_property
    def _groups(self) -> list[_Group]:
        """Return the groups, a level's after those of the level before; padding at most doubles a node."""

        def size(number: int) -> tuple[int, int]:
            node = self._nodes[number]
            return node.level, ((node.stop - node.start - 1) // _CHUNK).bit_length()

        numbers = sorted(range(len(self._nodes)), key=size)
        groups = (list(members) for _, members in itertools.groupby(numbers, size))
        return [_Group(members, self._nodes, self._device) for members in groups]

    @cached_property
    def _places(self) -> Tensor:
        """Return where each token is in the concatenated outputs of the groups, int64 [tokens]."""
        is_token = np.concatenate([group.is_token for group in self._groups])
        nodes = [self._nodes[member] for group in self._groups for member in group.members]
        order = np.concatenate([np.arange(node.start, node.stop) for node in nodes])
        return copy_to_device(self._device, np.flatnonzero(is_token)[np.argsort(order)])

    def convolve(
        self,
        function: Callable[..., Tensor],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return the causal convolution of `hidden` [1, channels, tokens]; rows give its left context."""
        width = weight.shape[-1] - 1
        if width not in self._contexts:
            tokens, places = with_contexts(self._segments, width)
            tokens = np.where(tokens < 0, hidden.shape[-1], tokens)
            on_device = (copy_to_device(self._device, indices) for indices in (tokens, places))
            self._contexts[width] = next(on_device), next(on_device)
        selected, own = self._contexts[width]
        # By tokens, which are contiguous: several times faster than by the last dimension.
        rows = pad(hidden[0].t(), (0, 0, 0, 1)).index_select(0, selected)
        convolved = function(rows.t()[None], weight, bias, **options)
        return convolved[0].t().index_select(0, own).t()[None]

    def _walk(self, inputs: Sequence[Tensor], step: Step) -> Tensor:
        """Return the outputs [1, tokens, ...] of `step` on `inputs` [1, tokens, ...], level by level."""
        padded = [pad(tensor[0].flatten(1), (0, 0, 0, 1)).view(-1, *tensor.shape[2:]) for tensor in inputs]
        has_children = {node.parent for node in self._nodes}
        outputs, states = list[Tensor](), dict[int, Tensor]()
        for group in self._groups:
            rows = [
                tensor.index_select(0, group.rows).view(*group.shape, *tensor.shape[1:]) for tensor in padded
            ]
            # All nodes of level 0 start without a state, and no others do.
            parents = [states[parent] for parent in group.parents if parent >= 0]
            initial = torch.stack(parents) if parents else None
            output, last = step(rows, initial, not has_children.isdisjoint(group.members))
            outputs.append(output.flatten(0, 1))
            if last is not None:
                states |= zip(group.members, last.unbind(), strict=True)
        return torch.cat(outputs).index_select(0, self._places)[None]

    def delta_rule(
        self,
        function: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Return the (gated) delta rule's outputs (arXiv:2412.06464); Kimi's has a decay for each channel.

        Padding has a `beta` and a log decay `g` of 0, so that it does not change the state.
        """

        def step(rows: list[Tensor], initial: Tensor | None, keeps: bool) -> tuple[Tensor, Tensor | None]:
            q, k, v, decay, rate = rows
            given = options | {"initial_state": initial, "output_final_state": keeps}
            output, last = function(q, k, v, g=decay, beta=rate, **given)
            return output, last if keeps else None

        return self._walk([query, key, value, g, beta], step), None

    def no_fused_kernel(self, *_: Any, **__: Any) -> None:
        """Make layers call the convolution and the scan, which one kernel would compute together."""

    def scan(
        self,
        function: Callable[..., Any],
        hidden: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803  (names of Mamba-2's paper)
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        *,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **options: Any,
    ) -> Tensor:
        """Return the outputs of Mamba-2's scan (arXiv:2405.21060).

        The time steps are computed here: padding has one of 0, which does not change the state, and the scan
        would raise it to the least step that the model allows.
        """
        dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
        dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

        def step(rows: list[Tensor], initial: Tensor | None, keeps: bool) -> tuple[Tensor, Tensor | None]:
            x, steps, b, c = rows
            given = options | {"initial_states": initial, "return_final_states": keeps}
            result = function(x, steps, A, b, c, **given)
            return result if keeps else (result, None)

        return self._walk([hidden, dt, B, C], step)
