"""The packed forward is exact for every architecture that is recorded as packed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.schema import AttentionBackend, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import (
    ARCHITECTURES,
    check_supported,
    switch_off_noise,
    training_notes,
)
from dpo_dist.model.attention import PACKED
from dpo_dist.model.load import load_config
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.rotary import rope_limit
from tests.support.families import COMMON, EXPERTS, LOW_RANK, ROUTED
from tests.support.packing import VOCABULARY, pack_unkeyed, plain_logps, random_pairs

SIZES = COMMON | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 32},
    "deepseek_v3": LOW_RANK | ROUTED | {"first_k_dense_replace": 1},
    "exaone4": {"sliding_window": 32},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 8, "sliding_window": 32, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 32},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "ministral": {"head_dim": 8, "sliding_window": 32},
    "ministral3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "minicpm3": LOW_RANK | {"dim_model_base": 16},
    "mixtral": {"num_local_experts": 2, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
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
    return AutoConfig.for_model(model_type, **{**SIZES, **OWN.get(model_type, {}), **own})


def trained_config(model_type: str, **own: Any) -> Any:
    """`tiny_config` without noise in training, as a loaded model has it."""
    config = tiny_config(model_type, **own)
    switch_off_noise(config)
    return config


def tiny_causal_lm(config: Any) -> Any:
    """A model in float32 whose random weights are large enough for every path to matter."""
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in causal_lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return causal_lm.eval()


def packed(causal_lm: Any) -> PackedCausalLM:
    causal_lm.config._attn_implementation = PACKED
    return PackedCausalLM(causal_lm, AttentionBackend.sdpa)


def gradients(causal_lm: Any, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    causal_lm.zero_grad()
    logps.square().sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in causal_lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model_type", "own"),
    [*((name, {}) for name in sorted(ARCHITECTURES)), ("qwen2", {"tie_word_embeddings": False})],
)
def test_packed_log_probs_and_gradients_equal_plain_ones(model_type: str, own: dict[str, Any]) -> None:
    config = tiny_config(model_type, **own)
    check_supported(config, LONGEST)
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
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention=all"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("gpt2", {"n_positions": LONGEST - 2}, "fewer positions"),
        ("opt", {"max_position_embeddings": LONGEST - 2}, "fewer positions"),
        ("mpt", {"max_seq_len": LONGEST - 2}, "fewer positions"),
        ("gptj", {"n_positions": LONGEST - 2}, "fewer positions"),
        ("codegen", {"n_positions": LONGEST - 2}, "fewer positions"),
    ],
)
def test_inexact_models_are_refused(model_type: str, own: dict[str, Any], named: str) -> None:
    config = AutoConfig.for_model(model_type, **own)
    with pytest.raises(ConfigError, match=named) as raised:
        check_supported(config, LONGEST)
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("model_type", "own"),
    [
        ("gemma4_text", {"use_bidirectional_attention": "vision"}),
        ("llama", {"max_position_embeddings": LONGEST // 2}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
    ],
)
def test_options_without_effect_are_accepted(model_type: str, own: dict[str, Any]) -> None:
    check_supported(AutoConfig.for_model(model_type, **own), LONGEST)


@pytest.mark.parametrize(
    ("model_type", "scaling"),
    [
        ("llama", {"type": "dynamic"}),
        ("llama", {"rope_type": "longrope"}),
        ("phi3", {"type": "longrope"}),
        ("gemma3_text", {"rope_type": "dynamic"}),
        ("gpt_neox", {"type": "dynamic"}),
    ],
)
def test_rope_of_older_config_files_is_read(model_type: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    """They write `rope_scaling`, with the original length beside it."""
    written = tiny_config(model_type).to_dict()
    del written["rope_parameters"]
    dynamic = "dynamic" in scaling.values()
    written |= {
        "rope_theta": 10000.0,
        "rope_scaling": scaling | {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "max_position_embeddings": LONGEST if dynamic else 64,
        "original_max_position_embeddings": LONGEST,
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert rope_limit(load_config(tmp_path, ModelConfig())) == LONGEST


def test_more_tokens_than_the_model_has_positions_are_a_warning() -> None:
    config = tiny_config("qwen3", max_position_embeddings=64)
    assert training_notes(config, 65) == []
    (note,) = training_notes(config, 66)
    assert note.startswith("warning: data.max_length=66 is more than the 64 positions of the model")


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_learned_positions_for_the_longest_input_are_enough(model_type: str) -> None:
    config = tiny_config(model_type, max_position_embeddings=LONGEST - 1)
    check_supported(config, LONGEST)
    causal_lm = tiny_causal_lm(config)
    batch = pack_unkeyed(random_pairs([(7, 9), (1, 4)]))
    assert packed(causal_lm)(batch).isfinite().all()


def with_rope(config: Any, rope_type: str, limit: int) -> Any:
    """`config` with another kind of RoPE, trained on sequences of `limit` tokens and stretched beyond."""

    def changed(default: dict[str, Any]) -> dict[str, Any]:
        rotated = int(head_dim * default.get("partial_rotary_factor", 1.0)) // 2
        own: dict[str, dict[str, Any]] = {
            "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "longrope": {
                "short_factor": [1.0 + 0.1 * place for place in range(rotated)],
                "long_factor": [3.0 + place for place in range(rotated)],
            },
        }
        length = {} if rope_type in ("linear", "dynamic") else {"original_max_position_embeddings": limit}
        return default | {"rope_type": rope_type, "factor": 4.0} | length | own.get(rope_type, {})

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = config.rope_parameters
    nested = {name: changed(value) for name, value in parameters.items() if isinstance(value, dict)}
    config.rope_parameters = nested or changed(parameters)
    config.max_position_embeddings = limit if rope_type == "dynamic" else 64
    if rope_type == "longrope":
        config.original_max_position_embeddings = limit
    return config
