"""Packed attention: choose the run's kernel, check it on the device, and register it with transformers."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sliding_window_causal_mask_function

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.pack import copy_to_device
from dpo_dist.batching.prefix_tree import Segment, first_tokens, paths
from dpo_dist.config.schema import FLASH_ATTN, AttentionBackend, Dtype
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.installed import is_installed
from dpo_dist.model.architectures import ImageMask, recorded_arrangement
from dpo_dist.model.attention.sdpa import (
    ImageRuns,
    Scores,
    SegmentAttention,
    mask_rule,
    pieces,
    with_one_dim,
)
from dpo_dist.model.kernel_check import TRIAL, TRIAL_TOKENS, kernel_fault
from dpo_dist.model.layers import layer_configs, layer_values
from dpo_dist.model.library_internals import flash_attention

# The variable-length kernels accept multiples of 8 as head dimension (others are padded), up to 256.
LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8


_Span = tuple[int, int, list[tuple[int, int]]]
"""A segment: its first query and the one after the last, and the same of the keys it sees, in parts."""


@dataclass(frozen=True)
class _Segments:
    """The segments of one call of a variable-length kernel."""

    keys: Tensor  # int64, their key indices in the packed sequence; shared tokens are in several segments
    lengths: tuple[Tensor, Tensor, int, int]  # cumulative ones of queries and keys, and the longest of each
    queries: Tensor | None = None  # int64, their query indices; None: all tokens in order


@dataclass
class VarlenAttention:
    """Packed attention by one call of a variable-length kernel for all segments (CUDA).

    With image tokens that see each other, two calls: a causal one, and one for the images.
    """

    segments: Sequence[Segment]
    backend: AttentionBackend
    device: torch.device
    runs: ImageRuns | None = None

    @cached_property
    def _causal(self) -> _Segments:
        return self._call_of(self._spans([()] * len(self.segments))[0])

    @cached_property
    def _with_images(self) -> tuple[dict[bool, _Segments], Tensor]:
        """Return the segments of text (True: causal) and of images, and each token's index in both."""
        assert self.runs is not None
        text, images = self._spans(self.runs.places)
        calls = dict[bool, _Segments]()
        queries = list[npt.NDArray[np.int64]]()
        for is_causal, spans in ((True, text), (False, images)):
            if spans:
                queries.append(np.concatenate([np.arange(start, stop) for start, stop, _ in spans]))
                indices = copy_to_device(self.device, queries[-1])
                calls[is_causal] = replace(self._call_of(spans), queries=indices)
        return calls, copy_to_device(self.device, np.argsort(np.concatenate(queries)))

    def _spans(self, runs: Sequence[Sequence[tuple[int, int]]]) -> tuple[list[_Span], list[_Span]]:
        """Return the segments of text and of images."""
        spans: tuple[list[_Span], list[_Span]] = [], []
        begin = 0
        for (_, shared, own), path, places in zip(self.segments, paths(self.segments), runs, strict=True):
            for start, stop, is_image in pieces(own, places):
                seen = first_tokens(path, shared + stop)
                spans[is_image].append((begin + start, begin + stop, seen))
            begin += own
        return spans

    def _call_of(self, spans: Sequence[_Span]) -> _Segments:
        queries = np.array([stop - start for start, stop, _ in spans], dtype=np.int32)
        seen_parts = [seen for *_, seen in spans]
        keys = np.array([sum(stop - start for start, stop in parts) for parts in seen_parts], dtype=np.int32)
        indices = np.concatenate([np.arange(*part) for part in itertools.chain(*seen_parts)])
        ends = [
            copy_to_device(self.device, np.cumsum((0, *part), dtype=np.int32)) for part in (queries, keys)
        ]
        lengths = ends[0], ends[1], int(queries.max()), int(keys.max())
        return _Segments(copy_to_device(self.device, indices), lengths)

    @cached_property
    def _by_segment(self) -> SegmentAttention:
        return SegmentAttention(self.segments, self.device, self.runs)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """See `PackedAttention`."""
        has_images = self.runs is not None and any(self.runs.of_layer(scores))
        calls = self._with_images[0] if has_images else {True: self._causal}
        max_key = max(call.lengths[3] for call in calls.values())
        rule = None if scores.rule is None or scores.rule.is_causal(max_key) else scores.rule
        is_other_rule = rule is not None and (scores.window is None or rule.reach != scores.window)
        dim = max(query.shape[-1], value.shape[-1])
        has_cap = scores.softcap is not None
        if _lacks(self.backend, dim, has_cap, scores.sinks is not None, is_other_rule):
            return self._by_segment(query, key, value, scores)
        window = None if rule is None else scores.window
        longest_image = calls[False].lengths[2] if has_images else 0
        if window is not None and longest_image > window and self.backend in FLASH_ATTN:
            # transformers limits FlashAttention's window on both sides.
            return self._by_segment(query, key, value, scores)
        dim = value.shape[-1]
        scale = scores.factor(query)
        heads = with_one_dim(query, key, value, _HEAD_MULTIPLE)
        attended = [
            self._call(call, heads, scores, scale, window, is_causal=is_causal)
            for is_causal, call in calls.items()
        ]
        if not has_images:
            return attended[0][..., :dim]
        return torch.cat(attended).index_select(0, self._with_images[1])[..., :dim]

    def _call(
        self,
        segments: _Segments,
        heads: tuple[Tensor, ...],
        scores: Scores,
        scale: float,
        window: int | None,
        *,
        is_causal: bool,
    ) -> Tensor:
        """Return the attention of these segments' queries by one call of the kernel."""
        query, key, value = heads
        if segments.queries is not None:
            query = query.index_select(0, segments.queries)
        key, value = key.index_select(0, segments.keys), value.index_select(0, segments.keys)
        if self.backend in FLASH_ATTN:
            return flash_attention(
                query,
                key,
                value,
                segments.lengths,
                is_causal=is_causal,
                softmax_scale=scale,
                sliding_window=window,
                softcap=scores.softcap,
                deterministic=torch.are_deterministic_algorithms_enabled(),
                attn_implementation=self.backend.value,
            )
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (needs a CUDA build)

        attended = varlen_attn(
            query,
            key,
            value,
            *segments.lengths,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0 if is_causal else -1),
            enable_gqa=query.shape[1] > key.shape[1],
        )
        assert isinstance(attended, Tensor)
        return attended


def _lacks(backend: AttentionBackend, dim: int, has_cap: bool, has_sinks: bool, has_chunks: bool) -> str:
    """Return a layer's feature that the variable-length kernel lacks; empty if it has all of them."""
    if has_sinks:
        return "attention sinks"
    if has_cap and backend not in FLASH_ATTN:
        return "capped scores"
    if has_chunks:
        return "chunks"
    return f"heads of {dim} dimensions" if dim > LARGEST_HEAD else ""


def computed_by_segment(causal_lm: Any, backend: AttentionBackend, longest: int) -> str:
    """Return why some layers run on SDPA, segment by segment, instead of `backend`; empty if none does.

    `longest` is the longest prompt plus response, in tokens.
    """
    text = causal_lm.config.get_text_config()
    if backend is AttentionBackend.sdpa:
        return ""
    has_sinks = any(name.endswith(".sinks") for name, _ in causal_lm.named_parameters())
    has_cap = any(map(bool, layer_values(text, "attn_logit_softcapping")))
    has_chunks = any(chunk and chunk < longest for chunk in layer_values(text, "attention_chunk_size"))
    reasons = (
        _lacks(backend, max(heads.dim, heads.value_dim), has_cap, has_sinks, has_chunks)
        for heads in layer_heads(text)
    )
    return ", ".join(dict.fromkeys(filter(None, reasons)))


PACKED = "dpo_dist_packed"


PackedAttention = Callable[[Tensor, Tensor, Tensor, Scores], Tensor]
"""Attention of one micro-batch, shared by all layers.

It maps query [tokens, heads, dim], key and value [tokens, kv_heads, dim] to [tokens, heads, dim].
"""


def packed_attention(
    segments: Sequence[Segment],
    backend: AttentionBackend,
    device: torch.device,
    runs: ImageRuns | None = None,
) -> PackedAttention:
    """Return the attention function for a micro-batch of these segments with these runs of image tokens."""
    if runs is not None and not any(runs.places):
        runs = None
    if backend is AttentionBackend.sdpa:
        return SegmentAttention(segments, device, runs)
    return VarlenAttention(segments, backend, device, runs)


def _with_temperature(module: Any, query: Tensor, positions: Tensor) -> Tensor:
    """Return Llama 4's queries [tokens, heads, dim] scaled by position, not by index as the model did."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query

    def factors(places: Tensor) -> Tensor:
        scale: float = module.attn_scale
        return torch.log1p(torch.floor((places.float() + 1) / module.floor_scale)) * scale + 1

    indices = torch.arange(len(query), device=query.device)
    ratios = factors(positions) / factors(indices)  # exactly 1 below floor_scale
    return (query * ratios[:, None, None]).to(query.dtype)


def _interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: PackedAttention | None = None,
    packed_positions: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers, which calls this in every layer with [1, heads, tokens, dim]."""
    assert packed is not None, "the model was called without a packed layout"
    assert packed_positions is not None
    assert dropout == 0.0, "dropout is switched off when the model is loaded"
    window = options.get("sliding_window")
    # Without a mask the window has no effect, as in the model's own forward, which applies masks only
    # (OLMoE).
    if window is not None and attention_mask is not None and attention_mask.reach != window:
        raise ValueError(f"a layer's sliding window of {window} tokens is not the window of its mask")
    scores = Scores(
        scale=scaling,
        rule=attention_mask,
        window=window,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    query = _with_temperature(module, query, packed_positions)
    return packed(query, key, value, scores)[None], None


# Every batch has another layout: torch.compile would compile the function again for each.
AttentionInterface.register(PACKED, torch.compiler.disable(_interface))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(PACKED, mask_rule)


# The variable-length kernels run on Ampere GPUs and newer.
_FIRST_CAPABILITY = (8, 0)

_TRIAL_RUNS = ((1, 4),), (), (), (), (), ((3, 9), (20, 340)), (), (), ((2, 5),), ()
_TRIAL_WINDOW = 6


@dataclass(frozen=True)
class Heads:
    """A layer's numbers of query heads and key heads, their dimension, and the dimension of value heads."""

    query: int
    key: int
    dim: int
    value_dim: int


def layer_heads(text: Any) -> list[Heads]:
    """Return the attention heads of each layer of a text model; a single entry if all layers are equal.

    Low-rank keys and values (DeepSeek-V2, arXiv:2405.04434) are projected up to one head per query head; in
    such a configuration `head_dim` is only the part with positions.
    """
    shapes = []
    for layer in layer_configs(text):
        heads: Any = getattr(layer, "num_attention_heads", None)
        if getattr(layer, "kv_lora_rank", None):
            dim = layer.qk_nope_head_dim + layer.qk_rope_head_dim
            shapes.append(Heads(heads, heads, dim, layer.v_head_dim))
        elif heads:
            dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
            shapes.append(Heads(heads, getattr(layer, "num_key_value_heads", None) or heads, dim, dim))
    return shapes


def choose_backend(setting: AttentionBackend, dtype: Dtype, device: torch.device) -> AttentionBackend:
    """Return the backend to use on `device`: `setting`, or for `auto` the fastest that supports `dtype`."""
    on_cuda = device.type == "cuda"
    if on_cuda:  # cuDNN would plan again for each pair of lengths: seconds in every micro-batch
        torch.backends.cuda.enable_cudnn_sdp(False)
    has_kernels = on_cuda and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
    if setting is AttentionBackend.auto:
        if not has_kernels or dtype is Dtype.fp32:  # the variable-length kernels have 16-bit inputs
            return AttentionBackend.sdpa
        is_hopper = torch.cuda.get_device_capability(device)[0] == 9
        fastest = [AttentionBackend.flash_attention_3] * is_hopper + [AttentionBackend.flash_attention_2]
        return next(
            (kernel for kernel in fastest if is_installed(FLASH_ATTN[kernel])), AttentionBackend.varlen
        )
    if setting is AttentionBackend.sdpa:
        return setting
    if not has_kernels:
        raise ConfigError(
            f"attention backend {setting} runs only on CUDA, on Ampere GPUs and newer",
            where="model.attention",
            got=f"{setting} on {torch.cuda.get_device_name(device) if on_cuda else device.type}",
            expected="auto or sdpa",
            remedy="set model.attention=auto",
        )
    if setting in FLASH_ATTN and not is_installed(FLASH_ATTN[setting]):
        name = FLASH_ATTN[setting]
        raise ConfigError(
            f"{name} is not installed",
            where="model.attention",
            got=setting,
            remedy=f"set model.attention=auto, or install {name}, built against the installed torch "
            "(pip install --no-build-isolation)",
        )
    return setting


def check_kernel(
    backend: AttentionBackend,
    device: torch.device,
    text: Any,
    dtype: torch.dtype,
    image_mask: ImageMask = ImageMask.causal,
) -> None:
    """Check the kernel's outputs and gradients with the heads, windows and caps of a text model's layers.

    With images in prompts, too, if the tokens of an image see each other (`image_mask`). The check at start
    compares log-probs only: it would not notice a kernel's wrong gradient.
    """
    if backend is AttentionBackend.sdpa or recorded_arrangement(text.model_type) is not Arrangement.packed:
        return
    kinds = [Scores(softcap=getattr(text, "attn_logit_softcapping", None))]
    if any(isinstance(window, int) for window in layer_values(text, "sliding_window")):
        rule = mask_rule(sliding_window_causal_mask_function(_TRIAL_WINDOW), _TRIAL_WINDOW, device=device)
        kinds.append(replace(kinds[0], window=_TRIAL_WINDOW, rule=rule))
    runs = [None] if image_mask is ImageMask.causal else [None, ImageRuns(_TRIAL_RUNS, in_windows_only=False)]
    for heads, scores, images in itertools.product(dict.fromkeys(layer_heads(text)), kinds, runs):
        fault = _kernel_fault(backend, device, heads, dtype, scores, images)
        if fault:
            layer = f"window {scores.window}, cap {scores.softcap}{'' if images is None else ', images'}"
            raise ConfigError(
                "this attention kernel fails or gives wrong results on this device",
                where="model.attention",
                got=f"{backend}, {dtype}, {heads}, {layer}: {fault}",
                remedy="set model.attention=sdpa, or another of its values",
            )


def _kernel_fault(
    backend: AttentionBackend,
    device: torch.device,
    heads: Heads,
    dtype: torch.dtype,
    scores: Scores,
    runs: ImageRuns | None,
) -> str:
    """Return which output or gradient differs from float32 SDPA's beyond rounding; empty if none."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (heads.query, heads.dim),
        "key": (heads.key, heads.dim),
        "value": (heads.key, heads.value_dim),
    }
    inputs = {
        name: torch.randn(TRIAL_TOKENS, *shape, generator=generator).to(device)
        for name, shape in shapes.items()
    }

    def attend(kernel: AttentionBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(TRIAL, kernel, device, runs)(query, key, value, scores)

    return kernel_fault(partial(attend, AttentionBackend.sdpa), partial(attend, backend), inputs, dtype)
