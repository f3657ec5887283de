"""Every accepted architecture gives packed what it gives plain; the others are refused."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.errors import ConfigError
from dpo_dist.model.attention import PACKED
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.packable import EXACT_MODEL_TYPES, refuse_unpackable
from tests.support.packing import VOCABULARY, pack_unkeyed, plain_logps, random_pairs

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OWN: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window": 32},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "gemma3_text": {"head_dim": 8, "sliding_window": 32},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "ministral": {"head_dim": 8, "sliding_window": 32},
    "ministral3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "seed_oss": {"head_dim": 8},
}
# Prompt, then responses: single tokens on either side, and three responses.
SHAPES = [(7, 5, 9), (1, 1, 4), (12, 3, 1), (4, 3, 2, 6)]
LONGEST = 16


def tiny_config(model_type: str, **own: Any) -> Any:
    config = AutoConfig.for_model(model_type, **{**COMMON, **OWN.get(model_type, {}), **own})
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def tiny_causal_lm(config: Any) -> Any:
    """A model in float32 whose random weights are large enough for every path to matter."""
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in causal_lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return causal_lm


def packed(causal_lm: Any) -> PackedCausalLM:
    causal_lm.config._attn_implementation = PACKED
    return PackedCausalLM(causal_lm, AttentionBackend.sdpa)


def gradients(causal_lm: Any, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    causal_lm.zero_grad()
    logps.square().sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in causal_lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model_type", "own"),
    [*((name, {}) for name in sorted(EXACT_MODEL_TYPES)), ("qwen2", {"tie_word_embeddings": False})],
)
def test_packed_is_plain(model_type: str, own: dict[str, Any]) -> None:
    config = tiny_config(model_type, **own)
    refuse_unpackable(config, LONGEST)
    causal_lm = tiny_causal_lm(config)
    pairs = random_pairs(SHAPES)
    expected = plain_logps(causal_lm, pairs)
    expected_gradients = gradients(causal_lm, expected)
    model = packed(causal_lm)
    logps = model(pack_unkeyed(pairs))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    ours = gradients(causal_lm, logps)
    assert ours.keys() == expected_gradients.keys()
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # A bias of keys has no gradient but rounding: its own norm is no measure.
        assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name


@pytest.mark.parametrize(
    ("model_type", "own", "named"),
    [
        ("gemma2", {"head_dim": 8}, "final_logit_softcapping"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling"),
        ("cohere", {}, "logit_scale"),
        ("mistral", {"sliding_window": LONGEST - 1}, "sliding window"),
        ("gemma3_text", {"head_dim": 8, "sliding_window": LONGEST - 1}, "sliding window"),
        ("phi3", {"sliding_window": LONGEST - 1}, "sliding window"),
        ("t5", {}, "t5"),
        # Mixes tokens outside of attention, in some layers or in all.
        ("mamba", {}, "mamba"),
        ("qwen3_next", {}, "qwen3_next"),
        ("falcon_h1", {}, "falcon_h1"),
        # Never calls the attention that is registered.
        ("bloom", {}, "bloom"),
        ("codegen", {}, "codegen"),
    ],
)
def test_what_would_not_be_exact_is_refused(model_type: str, own: dict[str, Any], named: str) -> None:
    config = AutoConfig.for_model(model_type, **own)
    with pytest.raises(ConfigError, match=named) as raised:
        refuse_unpackable(config, LONGEST)
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("model_type", "own"),
    [
        ("mistral", {"sliding_window": LONGEST}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
        ("granite", {"logits_scaling": 1.0}),
    ],
)
def test_options_that_change_nothing_are_accepted(model_type: str, own: dict[str, Any]) -> None:
    refuse_unpackable(AutoConfig.for_model(model_type, **own), LONGEST)


@pytest.mark.parametrize(
    ("model_type", "own", "named"),
    [
        ("gemma2", {"head_dim": 8, "sliding_window": 64}, "softcap"),
        ("mistral", {"sliding_window": 8}, "window"),
    ],
)
def test_a_layer_that_asks_for_more_is_refused_even_if_the_model_was_not(
    model_type: str, own: dict[str, Any], named: str
) -> None:
    model = packed(tiny_causal_lm(tiny_config(model_type, **own)))
    with pytest.raises(ConfigError, match=named):
        model(pack_unkeyed(random_pairs(SHAPES)))


def test_a_window_that_just_holds_the_longest_sequence_changes_nothing() -> None:
    causal_lm = tiny_causal_lm(tiny_config("mistral", sliding_window=12))
    pairs = random_pairs([(5, 8, 3)])
    expected = plain_logps(causal_lm, pairs)
    torch.testing.assert_close(packed(causal_lm)(pack_unkeyed(pairs)), expected, rtol=0, atol=1e-5)
