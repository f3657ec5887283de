"""Attention over packed pairs: each response sees its prompt and itself, and nothing is padded.

With a pair laid out as ``[P, R1, R2, ...]`` the queries ``{[P, R1], [R2], ...}`` meet the keys
``{[P, R1], [P, R2], ...}``, causal and aligned to the bottom right. This gives what one plain causal sequence
per response gives, at the cost of one prompt. Transformers' models reach it by `AttentionInterface`.
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

Layout = tuple[tuple[int, ...], ...]


class PackedAttention(Protocol):
    """Attention of one micro-batch, the same for every layer."""

    layout: Layout

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [tokens, heads, dim], key and value [tokens, kv_heads, dim] to [tokens, heads, dim]."""
        ...


def packed_attention(layout: Layout, backend: AttentionBackend, device: torch.device) -> PackedAttention:
    """The attention of a micro-batch with this layout."""
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
        # One split per tensor and granularity: the backward of a slice would write a full-size zero tensor.
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
    """One kernel call for all segments, with different cumulative lengths for queries and keys (CUDA)."""

    layout: Layout
    backend: AttentionBackend
    device: torch.device

    @cached_property
    def _segments(self) -> list[tuple[int, int]]:
        """(query tokens, key tokens) of each segment that has queries."""
        segments = []
        for prompt, first, *rest in self.layout:
            segments.append((prompt + first, prompt + first))
            segments += [(tokens, prompt + tokens) for tokens in rest if tokens]
        return segments

    @cached_property
    def _key_places(self) -> Tensor:
        """Where in the packed row each key of the segments lies: prompts repeat."""
        places: list[Tensor] = []
        start = 0
        for prompt, first, *rest in self.layout:
            places.append(torch.arange(start, start + prompt + first))
            end = start + prompt + first
            for tokens in rest:
                if tokens:
                    places += [torch.arange(start, start + prompt), torch.arange(end, end + tokens)]
                end += tokens
            start = end
        return _copied_to(self.device, torch.cat(places))

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
        key, value = key.index_select(0, self._key_places), value.index_select(0, self._key_places)
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
    """Causal `torch.nn.attention.varlen`, whose keywords differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (needs a CUDA build)

    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        raise ConfigError(
            "this torch's variable-length attention takes no scale or no window",
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
    """A copy on `device`, made while the host goes on; that takes page-locked memory."""
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
    """What transformers calls in every layer; tensors are [1, heads, tokens, dim]."""
    assert packed is not None, "the packed backbone was called without its layout"
    assert attention_mask is None
    assert dropout == 0.0, "dropout is switched off when the model is loaded"
    _check_supported(packed.layout, options)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packed(query, key, value, scaling)[None], None


def _check_supported(layout: Layout, options: dict[str, Any]) -> None:
    """Raise for what a layer asks of attention that the packed layout cannot give exactly."""
    for option in ("softcap", "s_aux", "position_bias"):
        if options.get(option) is not None:
            raise ConfigError(
                f"this architecture's attention uses {option}, which packed attention does not compute",
                where="model.path",
                remedy="choose another model; Qwen2/2.5/3, Llama, Mistral, Gemma and Phi work",
            )
    window = options.get("sliding_window")
    longest = max(pair[0] + max(pair[1:]) for pair in layout)
    if window is not None and window < longest:
        raise sliding_window_error(window, longest)


def sliding_window_error(window: int, longest: int) -> ConfigError:
    """Return the error for a model whose sliding window is shorter than a sequence.

    Args:
        window: tokens that a token sees, itself included.
        longest: input tokens of the longest sequence; its last token is no input.
    """
    return ConfigError(
        "the model's sliding window is shorter than a sequence, so packing would not be exact",
        where="data.max_length",
        got=f"window {window}, sequence {longest + 1}",
        remedy=f"set data.max_length to {window + 1} or less",
    )


# The layout is another one in every batch; torch.compile would make code for each.
AttentionInterface.register(PACKED, torch.compiler.disable(_interface))  # type: ignore[no-untyped-call]
