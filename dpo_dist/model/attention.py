"""Attention over packed pairs: each response attends to its prompt and itself, without padding.

For a pair with the layout ``[P, R1, R2, ...]``, the queries ``{[P, R1], [R2], ...}`` attend to the keys
``{[P, R1], [P, R2], ...}`` with a causal mask aligned to the bottom right. The result is that of one causal
sequence per response, at the cost of one prompt. Models of transformers call it by `AttentionInterface`.
"""

import inspect
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.errors import ConfigError

PACKED = "dpo_dist_packed"

OTHER_MODELS = "choose another model; Qwen2/2.5/3, Llama, Mistral, Gemma and Phi work"
"""Remedy of an error about an architecture that is not supported."""

Layout = tuple[tuple[int, ...], ...]


class PackedAttention(Protocol):
    """Attention of one micro-batch, shared by all layers."""

    layout: Layout

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Return [tokens, heads, dim]; query [tokens, heads, dim], key and value [tokens, kv_heads, dim]."""
        ...


def packed_attention(layout: Layout, backend: AttentionBackend, device: torch.device) -> PackedAttention:
    """Return the attention of a micro-batch with this layout."""
    if backend is AttentionBackend.sdpa:
        return SegmentAttention(layout, device)
    return VarlenAttention(layout, backend, device)


@dataclass
class SegmentAttention:
    """One `scaled_dot_product_attention` call per segment; runs everywhere."""

    layout: Layout
    device: torch.device

    @cached_property
    def _query_lengths(self) -> list[int]:
        return [n for prompt, first, *rest in self.layout for n in (prompt + first, *rest)]

    @cached_property
    def _key_lengths(self) -> list[int]:
        return [length for pair in self.layout for length in pair]

    @cached_property
    def _masks(self) -> dict[tuple[int, int], Tensor]:
        shapes = {(tokens, pair[0]) for pair in self.layout for tokens in pair[2:]}
        return {
            (tokens, prompt): torch.ones(tokens, prompt + tokens, dtype=torch.bool, device=self.device).tril(
                prompt
            )
            for tokens, prompt in shapes
        }

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `PackedAttention`."""
        # `split`, not slices: the backward of each slice would write a zero tensor of full size.
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        queries = iter(torch.split(query, self._query_lengths, dim=1))
        first_keys = iter(torch.split(key, self._query_lengths, dim=1))
        first_values = iter(torch.split(value, self._query_lengths, dim=1))
        keys = iter(torch.split(key, self._key_lengths, dim=1))
        values = iter(torch.split(value, self._key_lengths, dim=1))
        outputs = []
        for prompt_tokens, _, *rest in self.layout:
            outputs.append(_attend(next(queries), next(first_keys), next(first_values), None, scale))
            prompt_key, prompt_value = next(keys), next(values)
            next(keys), next(values)
            for tokens in rest:
                next(first_keys), next(first_values)
                outputs.append(
                    _attend(
                        next(queries),
                        torch.cat((prompt_key, next(keys)), dim=1),
                        torch.cat((prompt_value, next(values)), dim=1),
                        self._masks[tokens, prompt_tokens],
                        scale,
                    )
                )
        return torch.cat(outputs, dim=1).transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if query.shape[1] == 0:
        return query
    attended = scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0]


@dataclass
class VarlenAttention:
    """One kernel call for all segments, with separate cumulative lengths of queries and keys (CUDA)."""

    layout: Layout
    backend: AttentionBackend
    device: torch.device

    @cached_property
    def _segments(self) -> list[tuple[int, int]]:
        """Return (query tokens, key tokens) of each segment with queries."""
        segments = []
        for prompt, first, *rest in self.layout:
            segments.append((prompt + first, prompt + first))
            segments += [(tokens, prompt + tokens) for tokens in rest if tokens]
        return segments

    @cached_property
    def _key_indices(self) -> Tensor:
        """Return the index of each segment's keys in the packed sequence; prompts repeat."""
        indices: list[Tensor] = []
        start = 0
        for prompt, first, *rest in self.layout:
            indices.append(torch.arange(start, start + prompt + first))
            end = start + prompt + first
            for tokens in rest:
                if tokens:
                    indices += [torch.arange(start, start + prompt), torch.arange(end, end + tokens)]
                end += tokens
            start = end
        return _copied_to(self.device, torch.cat(indices))

    @cached_property
    def _cumulative(self) -> tuple[Tensor, Tensor]:
        queries, keys = zip(*self._segments, strict=True)
        return self._offsets(queries), self._offsets(keys)

    @cached_property
    def _longest(self) -> tuple[int, int]:
        return max(query for query, _ in self._segments), max(key for _, key in self._segments)

    def _offsets(self, lengths: tuple[int, ...]) -> Tensor:
        return _copied_to(self.device, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `PackedAttention`."""
        key, value = key.index_select(0, self._key_indices), value.index_select(0, self._key_indices)
        (cu_query, cu_key), (max_query, max_key) = self._cumulative, self._longest
        attended: Tensor
        if self.backend is AttentionBackend.flash_attention_2:
            from flash_attn import flash_attn_varlen_func  # noqa: PLC0415  (optional extra)

            attended = flash_attn_varlen_func(
                query,
                key,
                value,
                cu_query,
                cu_key,
                max_query,
                max_key,
                softmax_scale=scale,
                causal=True,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
        else:
            attended = _varlen(query, key, value, (cu_query, cu_key), (max_query, max_key), scale)
        return attended


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Return causal `torch.nn.attention.varlen`, whose keywords differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (needs a CUDA build)

    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        raise ConfigError(
            "the variable-length attention of this torch version has no scale or no window",
            where="model.attention",
            got=f"varlen with torch {torch.__version__}",
            expected="torch 2.11 or newer",
            remedy="update torch, or set model.attention=sdpa",
        )
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    attended = varlen_attn(query, key, value, *cumulative, *longest, **options)
    assert isinstance(attended, Tensor)
    return attended


def _copied_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a copy on `device`, transferred asynchronously from pinned memory."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def _interface(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: PackedAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function that transformers calls in every layer; tensors are [1, heads, tokens, dim]."""
    assert packed is not None, "the model was called without a packed layout"
    assert attention_mask is None
    assert dropout == 0.0, "dropout is switched off when the model is loaded"
    _check_supported(packed.layout, options)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packed(query, key, value, scaling)[None], None


def _check_supported(layout: Layout, options: dict[str, Any]) -> None:
    """Check that packed attention computes every option of a layer exactly."""
    for option in ("softcap", "s_aux", "position_bias"):
        if options.get(option) is not None:
            raise ConfigError(
                f"this architecture's attention uses {option}, which packed attention does not compute",
                where="model.path",
                remedy=OTHER_MODELS,
            )
    window = options.get("sliding_window")
    longest = max(pair[0] + max(pair[1:]) for pair in layout)
    if window is not None and window < longest:
        raise sliding_window_error(window, longest)


def sliding_window_error(window: int, longest: int) -> ConfigError:
    """Return the error for a model whose sliding window is shorter than a sequence.

    Args:
        window: tokens that a token attends to, itself included.
        longest: input tokens of the longest sequence; its last token is not an input.
    """
    return ConfigError(
        "the model's sliding window is shorter than a sequence, so packing would not be exact",
        where="data.max_length",
        got=f"window {window}, sequence {longest + 1}",
        remedy=f"set data.max_length to {window + 1} or less",
    )


# The layout differs in every batch, and torch.compile would compile code for each.
AttentionInterface.register(PACKED, torch.compiler.disable(_interface))  # type: ignore[no-untyped-call]
