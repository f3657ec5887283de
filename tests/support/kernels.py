"""Variable-length attention kernels in plain PyTorch, with the arguments that are used of those for CUDA."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils


def masked_attention(
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention under a mask by its definition; tensors are [tokens, heads, dim], sinks [heads]."""
    query, key, value = (tensor.transpose(0, 1) for tensor in heads)
    groups = len(query) // len(key)
    key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
    scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(mask), 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : mask.shape[1]]
    return (weights @ value).transpose(0, 1)


def by_segment(
    heads: tuple[Tensor, Tensor, Tensor],
    lengths: Sequence[Sequence[int]],
    scale: float | None,
    window_size: tuple[int, int] = (-1, 0),
    softcap: float = 0.0,
) -> Tensor:
    """Compute the result of a variable-length kernel, as flash-attn documents it.

    `lengths` are those of the segments of queries and of keys. Query i sees the keys from
    i + keys - queries - window_size[0] to i + keys - queries + window_size[1], both included; -1 is no limit.
    The cap is of scores that are multiplied by the scale.
    """
    of_queries, of_keys = lengths
    split = (tensor.split(of_keys if n else of_queries) for n, tensor in enumerate(heads))
    outputs = []
    for part in zip(*split, strict=True):
        queries, keys = len(part[0]), len(part[1])
        assert queries > 0
        ends = torch.arange(queries)[:, None] + keys - queries
        mask = torch.ones(queries, keys, dtype=torch.bool)
        if window_size[0] >= 0:
            mask &= torch.arange(keys) >= ends - window_size[0]
        if window_size[1] >= 0:
            mask &= torch.arange(keys) <= ends + window_size[1]
        outputs.append(masked_attention(part, mask, scale, softcap))
    return torch.cat(outputs)


def checked_by_segment(
    heads: tuple[Tensor, Tensor, Tensor],
    cumulative: Sequence[Tensor],
    longest: Sequence[int],
    scale: float | None,
    window_size: tuple[int, int] = (-1, 0),
    softcap: float = 0.0,
) -> Tensor:
    """Return `by_segment` of what a kernel takes."""
    query, key, value = heads
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    assert query.shape[-1] % 8 == 0
    assert all(tensor.stride(-1) == 1 and tensor.dtype == query.dtype for tensor in heads)
    assert all(bounds.dtype == torch.int32 and bounds.device == query.device for bounds in cumulative)
    assert all(bounds[0] == 0 and bounds.is_contiguous() for bounds in cumulative)
    lengths = [bounds.diff().tolist() for bounds in cumulative]
    assert list(longest) == list(map(max, lengths))
    assert [len(query), len(key)] == list(map(sum, lengths))
    return by_segment(heads, lengths, scale, window_size, softcap)


def varlen_attn_of_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *lengths: Any,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`; `lengths`: cumulative, of queries and keys, the longest."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return checked_by_segment((query, key, value), lengths[:2], lengths[2:], scale, window_size)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func` of flash-attn 2.8."""
    assert dropout_p == 0.0
    return checked_by_segment(
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        softmax_scale,
        (window_size[0], 0 if causal else window_size[1]),  # `causal` replaces the limit on the right
        softcap,
    )


def put_kernels(
    monkeypatch: pytest.MonkeyPatch,
    varlen_attn: Callable[..., Tensor] = varlen_attn_of_groups,
    flash_attn: Callable[..., Tensor] = flash_attn_varlen_func,
) -> None:
    """Put these in the place of the kernels that need CUDA."""
    varlen: Any = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(
        modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: (None, flash_attn, None, None, None)
    )
