"""Attention over packed pairs: each response attends to its prompt and itself, without padding.

For a pair with the layout ``[P, R1, R2, ...]``, the queries ``{[P, R1], [R2], ...}`` attend to the keys
``{[P, R1], [P, R2], ...}`` with a causal mask aligned to the bottom right. The result is that of one causal
sequence per response, at the cost of one prompt. Models of transformers call it by `AttentionInterface`, and
`AttentionMaskInterface` gives them a rule in the place of a mask (model/mask_rules.py).
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.errors import ConfigError
from dpo_dist.model.mask_rules import MaskRule, mask_rule, not_causal
from dpo_dist.model.query_temperature import corrected_query
from dpo_dist.model.segment_attention import Layout, Scores, SegmentAttention
from dpo_dist.model.varlen_attention import VarlenAttention

PACKED = "dpo_dist_packed"

OTHER_MODELS = "choose another model; Qwen2/2.5/3, Llama, Mistral, Gemma and Phi work"
"""Remedy of an error about an architecture that is not supported."""


class PackedAttention(Protocol):
    """Attention of one micro-batch, shared by all layers."""

    layout: Layout

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Return [tokens, heads, dim]; query [tokens, heads, dim], key and value [tokens, kv_heads, dim]."""
        ...


def packed_attention(layout: Layout, backend: AttentionBackend, device: torch.device) -> PackedAttention:
    """Return the attention of a micro-batch with this layout."""
    if backend is AttentionBackend.sdpa:
        return SegmentAttention(layout, device)
    return VarlenAttention(layout, backend, device)


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
    """Attention function that transformers calls in every layer; tensors are [1, heads, tokens, dim]."""
    assert packed is not None, "the model was called without a packed layout"
    assert packed_positions is not None
    assert dropout == 0.0, "dropout is switched off when the model is loaded"
    _check_supported(module, attention_mask, options)
    scores = Scores(
        scale=scaling,
        rule=attention_mask,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    query = corrected_query(module, query, packed_positions)
    return packed(query, key, value, scores)[None], None


def _check_supported(module: torch.nn.Module, rule: Any, options: dict[str, Any]) -> None:
    """Check that packed attention computes every option of a layer exactly, for sequences of any length.

    So the check at start, whose sequences are short, finds what a long one of the data would show.
    """
    is_causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise not_causal(f"{type(module).__name__}.is_causal=false")
    unknown = options.get("position_bias") is not None and "position_bias"
    if options.get("softcap") is not None and options.get("s_aux") is not None:
        unknown = "both softcap and s_aux"
    if rule is not None and not isinstance(rule, MaskRule):
        unknown = "a mask of its own"
    if unknown:
        raise ConfigError(
            f"this architecture's attention uses {unknown}, which packed attention does not compute",
            where="model.path",
            remedy=OTHER_MODELS,
        )
    window = options.get("sliding_window")
    # Without a rule all earlier tokens are visible: the model's own forward applies masks only (OLMoE).
    if window is not None and rule is not None and rule.reach != window:
        raise ConfigError(
            "a layer names a sliding window that its mask does not have",
            where="model.path",
            got=f"{type(module).__name__}: window {window}, mask reaching "
            f"{'all tokens' if rule.reach is None else rule.reach}",
            remedy=OTHER_MODELS,
        )


# The layout differs in every batch, and torch.compile would compile code for each.
AttentionInterface.register(PACKED, torch.compiler.disable(_interface))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(PACKED, mask_rule)
