"""The packed forward is exact: dense models, experts, windows, chunks, caps, sinks, scales."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.batching.pack import Sequences
from dpo_dist.config.schema import AttentionBackend, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import check_supported, switch_off_noise, training_notes
from dpo_dist.model.attention import PACKED
from dpo_dist.model.layers import checkpoint_layers
from dpo_dist.model.load import load_config
from dpo_dist.model.packed import LogpHead, PackedCausalLM, rope_limit
from tests.support.families import COMMON, EXPERTS, LOW_RANK, ROUTED
from tests.support.packing import VOCABULARY, pack_unkeyed, plain_logps, random_pairs

SIZES = COMMON | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Options that a small model of the architecture needs.
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
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": MIXTURE | {"head_dim": 8, "sliding_window": 32},
    "granitemoe": MIXTURE | {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "minicpm3": LOW_RANK | {"dim_model_base": 16},
    "ministral": {"head_dim": 8, "sliding_window": 32},
    "ministral3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phimoe": MIXTURE,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "seed_oss": {"head_dim": 8},
}
PLAIN = "ernie4_5 granite llama olmo olmo2 olmo3 phi phi3 qwen2 smollm3 starcoder2"
ARCHITECTURES = sorted({*OWN, *PLAIN.split()})
MULTIPLIERS = {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}
# Windows of all layers or of some, beside layers of full attention.
WINDOWED: dict[str, dict[str, Any]] = {
    "cohere2": {"num_hidden_layers": 4},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"attn_logit_softcapping": 1.0},
    "gemma3_text": {"final_logit_softcapping": 3.0, "num_hidden_layers": 6},
    "gpt_oss": {},
    "llama4_text": {
        "head_dim": 8,
        "num_hidden_layers": 4,
        "num_local_experts": 2,
        "moe_layers": [1],
        "intermediate_size_mlp": 48,
        "floor_scale": 4,
        "attn_scale": 0.5,
    },
    "ministral": {},
    "mistral": {},
    "mixtral": {},
    "olmo3": {"num_hidden_layers": 4},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [0, 1]},
    "starcoder2": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "granite": MULTIPLIERS | {"logits_scaling": 4.0},
    "granitemoe": MULTIPLIERS,
    "qwen2": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [0, 1]},
}
# Prompt, then responses: single tokens on either side, and three responses.
SHAPES = [(7, 5, 9), (1, 1, 4), (12, 3, 1), (4, 3, 2, 6)]
LONGEST = 16
shapes = st.lists(
    st.tuples(st.integers(1, 14), st.lists(st.integers(1, 12), min_size=1, max_size=3)).map(
        lambda pair: (pair[0], *pair[1])
    ),
    min_size=1,
    max_size=3,
)


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
    for name, parameter in causal_lm.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=1.0 if "sinks" in name else 0.15)
    return causal_lm.eval()


def windowed(model_type: str, window: int | None, **own: Any) -> Any:
    name = "attention_chunk_size" if model_type == "llama4_text" else "sliding_window"
    options = {**WINDOWED, **OTHERS}.get(model_type, {}) | ({name: window} if window else {})
    return tiny_causal_lm(tiny_config(model_type, **options | own))


def packed(causal_lm: Any, backend: AttentionBackend = AttentionBackend.sdpa) -> PackedCausalLM:
    causal_lm.config._attn_implementation = PACKED
    return PackedCausalLM(causal_lm, backend)


def gradients(causal_lm: Any, logps: Tensor) -> dict[str, Tensor]:
    causal_lm.zero_grad()
    logps.square().sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in causal_lm.named_parameters() if p.grad is not None}


def assert_same(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Of gradients. Where one has only rounding, such as a bias of keys, its own norm is no measure."""
    assert ours.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= tolerance * max(gradient.norm(), 0.1 * largest), name


def check_exact(
    causal_lm: Any,
    pairs: Sequence[Sequences],
    backend: AttentionBackend = AttentionBackend.sdpa,
) -> None:
    expected = plain_logps(causal_lm, pairs)
    expected_gradients = gradients(causal_lm, expected)
    logps = packed(causal_lm, backend)(pack_unkeyed(pairs))
    assert (logps - expected).norm() <= 1e-6 * expected.norm()
    assert_same(gradients(causal_lm, logps), expected_gradients)


@pytest.mark.parametrize(("model_type", "own"), [*((name, {}) for name in ARCHITECTURES), *OTHERS.items()])
def test_packed_log_probs_and_gradients_equal_plain_ones(model_type: str, own: dict[str, Any]) -> None:
    config = tiny_config(model_type, **own)
    check_supported(config)
    check_exact(tiny_causal_lm(config), random_pairs(SHAPES))


@pytest.mark.parametrize("model_type", WINDOWED)
@settings(max_examples=4)
@given(window=st.integers(2, 16), lengths=shapes)
def test_windows_of_any_length(model_type: str, window: int, lengths: list[tuple[int, ...]]) -> None:
    check_exact(windowed(model_type, window), random_pairs(lengths))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_compiled_layers_with_windows_caps_and_sinks_are_exact(model_type: str) -> None:
    """Of several layouts, as those compiled for any number of tokens must not keep the masks of the first.

    Recomputed in backward, too; and no further layout is compiled again.
    """
    causal_lm = windowed(model_type, 4)
    batches = [random_pairs(lengths) for lengths in (SHAPES, [(9, 5, 2, 1, 7)], [(3, 12), (20, 1, 1)])]
    expected = [plain_logps(causal_lm, pairs) for pairs in batches]
    expected_gradients = [gradients(causal_lm, logps) for logps in expected]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    causal_lm.config._attn_implementation = PACKED
    checkpoint_layers(causal_lm, "full")
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, compiled=True).train()
    for pairs, plain, plain_gradients in zip(batches, expected, expected_gradients, strict=True):
        logps = model(pack_unkeyed(pairs))
        assert (logps - plain).norm() <= 1e-6 * plain.norm()
        assert_same(gradients(causal_lm, logps), plain_gradients)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for tokens in (6, 11):
        gradients(causal_lm, model(pack_unkeyed(random_pairs([(tokens, tokens, 2 * tokens)]))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_the_model_changes_the_logits_of_its_own_forward() -> None:
    """Samples are drawn by the model's own forward, through the head without targets."""
    causal_lm = windowed("gemma2", 4)
    ids = torch.arange(3, 15)[None]
    expected = causal_lm(ids).logits
    model = packed(causal_lm)
    assert isinstance(causal_lm.get_output_embeddings(), LogpHead)
    with model.unpacked() as unpacked:
        torch.testing.assert_close(unpacked(ids).logits, expected, rtol=0, atol=1e-5)


def test_a_window_that_the_mask_lacks_is_an_error() -> None:
    causal_lm = windowed("gpt_oss", 20)
    causal_lm.model.layers[0].self_attn.sliding_window = 4
    for lengths in (SHAPES, [(2, 2, 1)]):  # also of short sequences, so that the check at start finds it
        with pytest.raises(ConfigError, match="its mask does not have"):
            packed(causal_lm)(pack_unkeyed(random_pairs(lengths)))


@pytest.mark.parametrize(
    ("model_type", "own", "fault"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("gemma4_text", {"use_bidirectional_attention": "vision"}, ""),
        ("llama", {"is_causal": False}, "is_causal"),
    ],
)
def test_models_that_cannot_be_exact_are_refused(model_type: str, own: dict[str, Any], fault: str) -> None:
    config = AutoConfig.for_model(model_type, **own)
    if not fault:
        check_supported(config)
        return
    with pytest.raises(ConfigError, match=fault):
        check_supported(config)


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
    written |= {
        "rope_theta": 10000.0,
        "rope_scaling": scaling | {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "max_position_embeddings": LONGEST if "dynamic" in scaling.values() else 64,
        "original_max_position_embeddings": LONGEST,
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert rope_limit(load_config(tmp_path, ModelConfig())) == LONGEST


def test_more_tokens_than_the_model_has_positions_are_a_warning() -> None:
    config = tiny_config("qwen3", max_position_embeddings=64)
    assert training_notes(config, 65) == []
    (note,) = training_notes(config, 66)
    assert note.startswith("warning: data.max_length=66 is more than the 64 positions of the model")


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
