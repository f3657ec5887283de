"""Packed attention by variable-length kernels (CUDA): one call for all segments of a layer.

A layer that needs what the kernel does not compute runs on `segment_attention`; a line in the log says so.
"""

import functools
import inspect
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.data.packing import copied_to
from dpo_dist.errors import ConfigError
from dpo_dist.model.segment_attention import Layout, Scores, SegmentAttention

log = logging.getLogger(__name__)

# The kernels are compiled for heads of these sizes.
LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8


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
        indices: list[npt.NDArray[np.int64]] = []
        start = 0
        for prompt, first, *rest in self.layout:
            indices.append(np.arange(start, start + prompt + first))
            end = start + prompt + first
            for tokens in rest:
                if tokens:
                    indices += [np.arange(start, start + prompt), np.arange(end, end + tokens)]
                end += tokens
            start = end
        return copied_to(self.device, np.concatenate(indices))

    @cached_property
    def _cumulative(self) -> tuple[Tensor, Tensor]:
        queries, keys = zip(*self._segments, strict=True)
        return self._offsets(queries), self._offsets(keys)

    @cached_property
    def _longest(self) -> tuple[int, int]:
        return max(query for query, _ in self._segments), max(key for _, key in self._segments)

    def _offsets(self, lengths: tuple[int, ...]) -> Tensor:
        return copied_to(self.device, np.cumsum((0, *lengths), dtype=np.int32))

    @cached_property
    def _by_segment(self) -> SegmentAttention:
        return SegmentAttention(self.layout, self.device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """See `attention.PackedAttention`."""
        (cu_query, cu_key), (max_query, max_key) = self._cumulative, self._longest
        is_windowed = scores.rule is not None and not scores.rule.is_causal(max_key)
        lacking = _lacking(self.backend, query, value, scores, is_windowed)
        if lacking is not None:
            _log_sdpa(self.backend, lacking)
            return self._by_segment(query, key, value, scores)
        earlier = -1
        if is_windowed:
            assert scores.window is not None
            earlier = scores.window - 1
        key, value = key.index_select(0, self._key_indices), value.index_select(0, self._key_indices)
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
                softmax_scale=scores.scale,
                causal=True,
                window_size=(earlier, -1 if earlier < 0 else 0),
                softcap=scores.softcap or 0.0,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
        else:
            attended = _varlen(
                query, key, value, (cu_query, cu_key), (max_query, max_key), scores.scale, earlier
            )
        return attended


def _lacking(
    backend: AttentionBackend, query: Tensor, value: Tensor, scores: Scores, is_windowed: bool
) -> str | None:
    """Return what a layer needs and the kernel does not compute; None if it computes all."""
    sizes = {query.shape[-1], value.shape[-1]}
    if scores.sinks is not None:
        return "attention sinks"
    if scores.softcap is not None and backend is AttentionBackend.varlen:
        return "capped scores"
    if is_windowed and (scores.rule is None or scores.window is None or scores.rule.reach != scores.window):
        return "masks other than sliding windows"
    if len(sizes) > 1 or max(sizes) > LARGEST_HEAD or max(sizes) % _HEAD_MULTIPLE:
        return f"heads of {' and '.join(str(size) for size in sorted(sizes))} dimensions"
    return None


@functools.cache
def _log_sdpa(backend: AttentionBackend, lacking: str) -> None:
    log.info("attention: %s has no %s, so layers with them run on sdpa", backend, lacking)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    earlier: int,
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
    options: dict[str, Any] = {"scale": scale, "window_size": (earlier, 0)}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    attended = varlen_attn(query, key, value, *cumulative, *longest, **options)
    assert isinstance(attended, Tensor)
    return attended
