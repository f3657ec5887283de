"""Recurrent layers on a packed sequence: each node of the tree of states starts in its parent's state."""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from dpo_dist.batching.pack import copy_to_device
from dpo_dist.batching.prefix_tree import Segment
from dpo_dist.batching.state_tree import StateNode, state_nodes, with_contexts
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.kernel_check import TRIAL, TRIAL_TOKENS, kernel_fault
from dpo_dist.model.library_internals import KIMI_RULE, is_kernel, recurrent_functions, takes_kernel

# Recurrent layers compute chunks of this many tokens.
_CHUNK = 64

Step = Callable[["_Group", list[Tensor], Tensor | None], tuple[Tensor, Tensor | None]]
"""Map a group's inputs [rows, tokens, ...] and states [nodes, ...] to outputs and, if kept, last states."""


class _Group:
    """Nodes of one level that one call computes: rows padded to the longest, or joined in one row."""

    def __init__(
        self,
        members: Sequence[int],
        nodes: Sequence[StateNode],
        device: torch.device,
        *,
        joined: bool,
        keeps: bool,
    ):
        self.members = members
        self.parents = [nodes[member].parent for member in members]
        self.keeps = keeps
        self.lengths: dict[str, Tensor] = {}
        spans = [np.arange(nodes[member].start, nodes[member].stop) for member in members]
        lengths = np.array(list(map(len, spans)))
        if joined:
            tokens = np.concatenate(spans)[None]
            ends = np.append(0, lengths.cumsum())
            counts = -(-lengths // _CHUNK)
            chunks = np.stack(
                [np.arange(len(spans)).repeat(counts), np.concatenate([*map(np.arange, counts)])], 1
            )
            # The chunks, too: each layer would compute them again, and wait for the device.
            self.lengths = {
                "cu_seqlens": copy_to_device(device, ends),
                "cu_seqlens_cpu": torch.from_numpy(ends),
                "chunk_indices": copy_to_device(device, chunks),
            }
        else:
            tokens = np.full((len(members), lengths.max()), -1)
            for row, span in zip(tokens, spans, strict=True):
                row[: len(span)] = span
        self.tokens = tokens  # indices in the packed sequence; -1: padding


class _Levels:
    """The nodes in groups, a level's after those of the level before; padding at most doubles chunks."""

    def __init__(self, nodes: Sequence[StateNode], device: torch.device, joined: bool):
        def kind(number: int) -> tuple[int, int]:
            node = nodes[number]
            return node.level, 0 if joined else ((node.stop - node.start - 1) // _CHUNK).bit_length()

        numbers = sorted(range(len(nodes)), key=kind)
        parents = {node.parent for node in nodes}
        self.groups = list[_Group]()
        for _, same in itertools.groupby(numbers, kind):
            members = list(same)
            keeps = not parents.isdisjoint(members)
            self.groups.append(_Group(members, nodes, device, joined=joined, keeps=keeps))
        tokens = np.concatenate([group.tokens.ravel() for group in self.groups])
        # Which token each place of the groups has, the index behind the last where it is padding; the places
        # of the tokens in their order. Both int64, on the device.
        self.selected = copy_to_device(device, np.where(tokens < 0, nodes[-1].stop, tokens))
        places = np.flatnonzero(tokens >= 0)
        self.places = copy_to_device(device, places[np.argsort(tokens[places])])


class ForkedStates:
    """The tree of states of one micro-batch, shared by all layers of a forward (`packed_states`).

    The state at the end of a node is the initial state of its children, and the gradient flows back through
    it, so that each token is computed once, as in attention.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device):
        self._segments = segments
        self._device = device
        self._contexts: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def _nodes(self) -> list[StateNode]:
        return state_nodes(self._segments)

    @cached_property
    def _padded(self) -> _Levels:
        return _Levels(self._nodes, self._device, joined=False)

    @cached_property
    def _joined(self) -> _Levels:
        return _Levels(self._nodes, self._device, joined=True)

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
            self._contexts[width] = copy_to_device(self._device, tokens), copy_to_device(self._device, places)
        selected, own = self._contexts[width]
        # By tokens, which are contiguous: several times faster than by the last dimension.
        rows = pad(hidden[0].t(), (0, 0, 0, 1)).index_select(0, selected)
        convolved = function(rows.t()[None], weight, bias, **options)
        return convolved[0].t().index_select(0, own).t()[None]

    def _walk(self, levels: _Levels, inputs: Sequence[Tensor], step: Step) -> Tensor:
        """Return the outputs [1, tokens, ...] of `step` on `inputs` [1, tokens, ...], level by level."""
        # Inputs are 0 behind the last token. Selected at once: the gradient of a selection has all tokens.
        sizes = [group.tokens.size for group in levels.groups]
        selected = [
            torch.split(pad(tensor[0].flatten(1), (0, 0, 0, 1)).index_select(0, levels.selected), sizes)
            for tensor in inputs
        ]
        outputs = list[Tensor]()
        states = dict[int, Tensor]()
        for group, *parts in zip(levels.groups, *selected, strict=True):
            rows = [
                part.view(*group.tokens.shape, *tensor.shape[2:])
                for part, tensor in zip(parts, inputs, strict=True)
            ]
            # All nodes of level 0 start without a state, and no others do.
            parents = [states[parent] for parent in group.parents if parent >= 0]
            output, last = step(group, rows, torch.stack(parents) if parents else None)
            outputs.append(output.flatten(0, 1))
            if last is not None:
                states |= zip(group.members, last.unbind(), strict=True)
        return torch.cat(outputs).index_select(0, levels.places)[None]

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

        Padding has a `beta` and a log decay `g` of 0, so that it does not change the state. A kernel takes
        the nodes of a level without padding.
        """

        def step(group: _Group, rows: list[Tensor], initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
            q, k, v, decay, rate = rows
            states = {"initial_state": initial, "output_final_state": group.keeps}
            output, last = function(q, k, v, g=decay, beta=rate, **(options | states | group.lengths))
            return output, last if group.keeps else None

        levels = self._joined if is_kernel(function) else self._padded
        return self._walk(levels, [query, key, value, g, beta], step), None

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
        if not is_kernel(function):
            # Any chunk gives the same result. PyTorch pads each node to a whole one, in Granite 4 256 tokens.
            options["chunk_size"] = min(options["chunk_size"], _CHUNK)
        dt = dt.float()
        if dt_bias is not None:
            dt = dt + dt_bias.float()
        if dt_softplus:
            dt = softplus(dt)
        dt = dt.clamp(*dt_limit)

        def step(group: _Group, rows: list[Tensor], initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
            x, steps, b, c = rows
            states = {"initial_states": initial, "return_final_states": group.keeps}
            result = function(x, steps, A, b, c, **(options | states))
            return result if group.keeps else (result, None)

        return self._walk(self._padded, [hidden, dt, B, C], step)


def lacks_delta_kernels(causal_lm: Any) -> bool:
    """Return whether plain PyTorch computes a delta rule of this model, whatever the precision."""
    called = [called for method, _, called in recurrent_functions(causal_lm) if method == "delta_rule"]
    return not all(map(is_kernel, called))


Draw = Callable[..., Tensor]
"""Return normal numbers of a shape."""
Trial = tuple[Callable[..., Tensor], dict[str, Tensor]]
"""What calls a method of `ForkedStates` with a modeling file's function and inputs by name; these inputs."""


def _convolution(_text: Any, _plain: Callable[..., Any], draw: Draw) -> Trial:
    def compute(states: ForkedStates, function: Callable[..., Any], hidden: Tensor, weight: Tensor) -> Tensor:
        return states.convolve(function, hidden.t()[None], weight, activation="silu")[0].t()

    return compute, {"hidden": draw(TRIAL_TOKENS, 16), "weight": draw(16, 4)}


def _delta_rule(text: Any, plain: Callable[..., Any], draw: Draw) -> Trial:
    if plain.__name__ == KIMI_RULE:  # a decay for each channel; the others have one for each head
        key = value = decay = [2, text.linear_head_dim]
    else:
        # With so many values a key as in the model: kernels compute shared keys by other code.
        values = 2 * text.linear_num_value_heads // text.linear_num_key_heads
        key = [2, text.linear_key_head_dim]
        value = [values, text.linear_value_head_dim]
        decay = [values]

    def compute(
        states: ForkedStates,
        function: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
    ) -> Tensor:
        rows = query[None], key[None], value[None]
        # As models call it: decays are float32 in any dtype.
        decays = g[None].float()
        rates = beta[None]
        return states.delta_rule(function, *rows, g=decays, beta=rates, use_qk_l2norm_in_kernel=True)[0][0]

    shapes = {"query": key, "key": key, "value": value, "g": decay, "beta": value[:1]}
    inputs = {name: draw(TRIAL_TOKENS, *shape) for name, shape in shapes.items()}
    return compute, inputs | {"g": -0.1 * inputs["g"].abs(), "beta": inputs["beta"].sigmoid()}


def _scan(_text: Any, _plain: Callable[..., Any], draw: Draw) -> Trial:
    def compute(
        states: ForkedStates,
        function: Callable[..., Any],
        hidden: Tensor,
        dt: Tensor,
        keys: Tensor,
        queries: Tensor,
    ) -> Tensor:
        rates = torch.arange(1.0, 5.0, device=hidden.device)
        inputs = hidden[None], dt[None], -rates, keys[None], queries[None]
        return states.scan(function, *inputs, D=rates, chunk_size=_CHUNK)[0]

    inputs = {"hidden": draw(TRIAL_TOKENS, 4, 64), "dt": 0.1 * draw(TRIAL_TOKENS, 4).sigmoid()}
    return compute, inputs | {"keys": draw(TRIAL_TOKENS, 2, 64), "queries": draw(TRIAL_TOKENS, 2, 64)}


_TRIALS = {
    "convolve": ("causal-conv1d", _convolution),
    "delta_rule": ("flash-linear-attention", _delta_rule),
    "scan": ("mamba-ssm", _scan),
}


def check_recurrent_kernels(causal_lm: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Check the outputs and gradients of the kernels that compute a model's recurrent layers, if any do."""
    text = causal_lm.config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    takes_rule = takes_kernel(torch.empty(0, dtype=dtype, device=device))
    for method, plain, called in recurrent_functions(causal_lm):
        is_refused = method == "delta_rule" and not takes_rule
        if method not in _TRIALS or not is_kernel(called) or is_refused:
            continue
        library, trial = _TRIALS[method]
        compute, inputs = trial(text, plain, draw)
        compute = partial(compute, ForkedStates(TRIAL, device))
        fault = kernel_fault(partial(compute, plain), partial(compute, called), inputs, dtype)
        if fault:
            raise ConfigError(
                f"this kernel of {library} fails or gives wrong results on this device",
                where="model.path",
                got=f"{text.model_type}, {fault}",
                remedy=f"install another version of {library}, or remove it: plain PyTorch computes the rest",
            )
