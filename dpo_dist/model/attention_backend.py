"""Choose the attention kernel of a run, and check its results on the device before training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sliding_window_causal_mask_function

from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.data.arrangement import Arrangement
from dpo_dist.errors import ConfigError
from dpo_dist.model.architectures import recorded_arrangement
from dpo_dist.model.attention import packed_attention
from dpo_dist.model.layer_options import layer_configs, layer_values
from dpo_dist.model.mask_rules import mask_rule
from dpo_dist.model.optional_packages import check_flash_attn, has_flash_attn
from dpo_dist.model.segment_attention import Layout, Scores

# The variable-length kernels need Ampere's instructions, as bf16 does.
_FIRST_CAPABILITY = (8, 0)

# Several segments, a response of one token, another of three.
_TRIAL: Layout = ((5, 3, 7), (2, 0, 4), (130, 2, 1))
_TRIAL_WINDOW = 6
# Relative to the largest value. In bf16, gradients of keys and values differ by 0.013 of it (SDPA, 32 heads
# of 128 in 8 groups); with a different mask they differ by about the largest value itself.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Heads:
    """Shape of a model's attention.

    Attributes:
        query: number of query heads.
        key: number of key heads.
        dim: of a head of queries and keys.
        own_value_dim: of a head of values; None: `dim`.
    """

    query: int
    key: int
    dim: int
    own_value_dim: int | None = None

    @property
    def value_dim(self) -> int:
        """Return the dimension of a head of values."""
        return self.dim if self.own_value_dim is None else self.own_value_dim


def heads_of_layers(text: Any) -> list[Heads]:
    """Return the attention shape of each layer of a text model, one for all if they are equal.

    Empty for a model without attention.
    """
    layers = layer_configs(text)
    return [heads_of(layer) for layer in layers if getattr(layer, "num_attention_heads", None)]


def heads_of(model_config: Any) -> Heads:
    """Return the attention shape of the transformers configuration of a layer.

    Keys and values of low rank (DeepSeek-V2, arXiv 2405.04434) are projected up to a head for each query
    head, whose `head_dim` in the configuration is only the part with positions.
    """
    heads: int = model_config.num_attention_heads
    if getattr(model_config, "kv_lora_rank", None):
        dim = model_config.qk_nope_head_dim + model_config.qk_rope_head_dim
        return Heads(heads, heads, dim, model_config.v_head_dim)
    dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    return Heads(heads, getattr(model_config, "num_key_value_heads", None) or heads, dim)


def choose_backend(wanted: AttentionBackend, dtype: Dtype, device: torch.device) -> AttentionBackend:
    """Return the backend to use on `device`: `wanted`, or for `auto` the fastest that supports `dtype`.

    Raises:
        ConfigError: the backend cannot run on this device.
    """
    on_cuda = device.type == "cuda"
    if wanted is AttentionBackend.auto:
        # The variable-length kernels have 16-bit inputs.
        if not on_cuda or dtype is Dtype.fp32 or _capability(device) < _FIRST_CAPABILITY:
            return AttentionBackend.sdpa
        return AttentionBackend.flash_attention_2 if has_flash_attn() else AttentionBackend.varlen
    if wanted is AttentionBackend.sdpa:
        return wanted
    if not on_cuda or _capability(device) < _FIRST_CAPABILITY:
        raise ConfigError(
            f"attention backend {wanted} runs on CUDA only, on Ampere GPUs and newer",
            where="model.attention",
            got=f"{wanted} on {torch.cuda.get_device_name(device) if on_cuda else device.type}",
            expected="auto or sdpa",
            remedy="set model.attention=auto",
        )
    if wanted is AttentionBackend.flash_attention_2:
        check_flash_attn()
    return wanted


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def scores_of(model_config: Any) -> list[Scores]:
    """Return the kinds of scores that a kernel must compute for layers of a transformers configuration.

    Windows are shorter than those of the model, so that a small layout shows them.
    """
    text = model_config.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)
    kinds = [Scores(softcap=softcap)]
    if any(isinstance(window, int) for window in layer_values(text, "sliding_window")):
        kinds.append(Scores(window=_TRIAL_WINDOW, softcap=softcap))
    return kinds


def check_kernels(backend: AttentionBackend, device: torch.device, text: Any, dtype: torch.dtype) -> None:
    """Check this backend with the heads and scores of each layer by `check_kernel`, if it is used.

    Args:
        backend: from `choose_backend`.
        device: of the run.
        text: the transformers configuration of a text model.
        dtype: of the model's activations.

    Raises:
        ConfigError: the results differ by more than rounding, or the kernel fails.
    """
    if backend is AttentionBackend.sdpa or recorded_arrangement(text.model_type) is not Arrangement.packed:
        return
    for heads in dict.fromkeys(heads_of_layers(text)):
        check_kernel(backend, device, heads, dtype, scores_of(text))


def check_kernel(
    backend: AttentionBackend,
    device: torch.device,
    heads: Heads,
    dtype: torch.dtype,
    kinds: Sequence[Scores] = (Scores(),),
) -> None:
    """Check this backend against SDPA in float32 on a small layout, forward and backward.

    A kernel with another alignment of the causal mask, or another meaning of lengths, would give wrong
    log-probs to policy and reference alike, which no later check could detect.

    Args:
        backend: from `choose_backend`.
        device: of the run.
        heads: of a layer.
        dtype: of the model's activations.
        kinds: from `scores_of`.

    Raises:
        ConfigError: the results differ by more than rounding, or the kernel fails.
    """
    for scores in kinds:
        _check_scores(backend, device, heads, dtype, scores)


def _check_scores(
    backend: AttentionBackend, device: torch.device, heads: Heads, dtype: torch.dtype, scores: Scores
) -> None:
    if scores.window is not None:
        function = sliding_window_causal_mask_function(scores.window)
        scores = replace(scores, rule=mask_rule(function, scores.window, device=device))
    described = _describe(heads, dtype, scores)
    rounded = _random_heads(device, heads, dtype)
    wanted = _attend(AttentionBackend.sdpa, device, [tensor.float() for tensor in rounded], scores)
    try:
        got = _attend(backend, device, rounded, scores)
    except ConfigError:
        raise
    except Exception as error:  # a kernel can raise anything
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(
            "this attention kernel fails on this device",
            where="model.attention",
            got=f"{backend} with {described}: {type(error).__name__}: {reason}",
            remedy="set model.attention=sdpa, or another of its values",
        ) from error
    for name, ours, theirs in zip(("output", "query", "key", "value"), got, wanted, strict=True):
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        if not difference < _TOLERANCE:
            tensor = "output" if name == "output" else f"gradient of the {name}"
            raise ConfigError(
                "this attention kernel gives wrong results on this device",
                where="model.attention",
                got=f"{backend} with {described}: its {tensor} differs from sdpa's by {difference:.2g}",
                remedy="set model.attention=sdpa, or another of its values",
            )


def _describe(heads: Heads, dtype: torch.dtype, scores: Scores) -> str:
    kind = str(dtype).removeprefix("torch.")
    window = "" if scores.window is None else ", a sliding window"
    softcap = "" if scores.softcap is None else ", capped scores"
    dims = str(heads.dim) if heads.own_value_dim is None else f"{heads.dim} and {heads.value_dim}"
    return f"{heads.query} query and {heads.key} key heads of {dims} in {kind}{window}{softcap}"


def _random_heads(device: torch.device, heads: Heads, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key and value of the trial layout, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, _TRIAL))
    shapes = [(heads.query, heads.dim), (heads.key, heads.dim)]
    shapes += [(heads.key, heads.value_dim), (heads.query, heads.value_dim)]
    return [torch.randn(tokens, *shape, generator=generator).to(device, dtype) for shape in shapes]


def _attend(
    backend: AttentionBackend, device: torch.device, tensors: list[Tensor], scores: Scores
) -> tuple[Tensor, ...]:
    """Return the attention output of `_random_heads`, and gradients of query, key and value, in float32."""
    *heads, output_gradient = tensors
    with torch.enable_grad():
        query, key, value = (tensor.requires_grad_() for tensor in heads)
        output = packed_attention(_TRIAL, backend, device)(query, key, value, scores)
        gradients = torch.autograd.grad(output, (query, key, value), output_gradient)
    return tuple(tensor.detach().float() for tensor in (output, *gradients))
