"""Models with windows, chunks, capped scores, sinks and changed logits are exact when packed."""

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from dpo_dist.batching.pack import Sequences
from dpo_dist.config.schema import AttentionBackend
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.attention import PACKED
from dpo_dist.model.packed import LogpHead, PackedCausalLM, logit_change
from dpo_dist.objective.token_logps import LogitChange
from tests.support.families import LOW_RANK, ROUTED
from tests.support.kernels import put_kernels
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.unit.model.test_architectures import SHAPES, gradients, tiny_causal_lm, tiny_config

GRANITE = {
    "logits_scaling": 4.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
}
# Windows of all layers or of some, beside layers of full attention; `window` is the option's name.
WINDOWED: dict[str, dict[str, Any]] = {
    "cohere2": {"num_hidden_layers": 4, "logit_scale": 0.25},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 3.0, "num_hidden_layers": 6},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
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
    "ministral3": {},
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
    "cohere": {"logit_scale": 0.25},
    "deepseek_v3": LOW_RANK | ROUTED,
    "granite": GRANITE,
    "granitemoe": GRANITE | {"num_local_experts": 2},
    "hyperclovax": {"logits_scaling": 0.5},
    "minicpm3": LOW_RANK | {"dim_model_base": 16},
    "smollm3": {"no_rope_layers": [0, 1]},
}


def model_of(model_type: str, own: dict[str, Any], window: int | None = None) -> Any:
    name = "attention_chunk_size" if model_type == "llama4_text" else "sliding_window"
    causal_lm = tiny_causal_lm(tiny_config(model_type, **own, **({name: window} if window else {})))
    with torch.no_grad():
        for parameter_name, parameter in causal_lm.named_parameters():
            if "sinks" in parameter_name:
                torch.nn.init.normal_(parameter)
    return causal_lm


def packed(causal_lm: Any, backend: AttentionBackend = AttentionBackend.sdpa) -> PackedCausalLM:
    causal_lm.config._attn_implementation = PACKED
    return PackedCausalLM(causal_lm, backend)


def check_exact(
    causal_lm: Any, pairs: list[Sequences], backend: AttentionBackend = AttentionBackend.sdpa
) -> None:
    expected = plain_logps(causal_lm, pairs)
    expected_gradients = gradients(causal_lm, expected)
    logps = packed(causal_lm, backend)(pack_unkeyed(pairs))
    assert (logps - expected).norm() <= 1e-6 * expected.norm()
    ours = gradients(causal_lm, logps)
    assert ours.keys() == expected_gradients.keys()
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # Weights without a gradient but rounding have no measure in their own norm.
        assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 0.1 * largest), name


shapes = st.lists(
    st.tuples(st.integers(1, 14), st.lists(st.integers(1, 12), min_size=1, max_size=3)).map(
        lambda pair: (pair[0], *pair[1])
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("model_type", WINDOWED)
@settings(max_examples=4)
@given(window=st.integers(2, 16), lengths=shapes)
def test_windows_of_any_length(model_type: str, window: int, lengths: list[tuple[int, ...]]) -> None:
    check_exact(model_of(model_type, WINDOWED[model_type], window), random_pairs(lengths))


@pytest.mark.parametrize("backend", [AttentionBackend.varlen, AttentionBackend.flash_attention_2])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "llama4_text", "qwen2"])
def test_kernels_with_windows(
    model_type: str, backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kernels(monkeypatch)
    check_exact(model_of(model_type, WINDOWED[model_type], 4), random_pairs(SHAPES), backend)


@pytest.mark.parametrize("model_type", OTHERS)
def test_scales_of_layers_and_of_logits(model_type: str) -> None:
    check_exact(model_of(model_type, OTHERS[model_type]), random_pairs(SHAPES))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_compiled_layers_with_windows_caps_and_sinks_are_exact(model_type: str) -> None:
    """Of several layouts, as those compiled for any number of tokens must not keep the masks of the first."""
    causal_lm = model_of(model_type, WINDOWED[model_type], 4)
    lengths = [SHAPES, [(9, 5, 2, 1, 7)], [(3, 12), (20, 1, 1)]]
    batches = [random_pairs(shapes) for shapes in lengths]
    expected = [plain_logps(causal_lm, pairs) for pairs in batches]
    expected_gradients = [gradients(causal_lm, logps) for logps in expected]
    torch._dynamo.reset()
    causal_lm.config._attn_implementation = PACKED
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, compiled=True)
    for pairs, plain, plain_gradients in zip(batches, expected, expected_gradients, strict=True):
        logps = model(pack_unkeyed(pairs))
        assert (logps - plain).norm() <= 1e-6 * plain.norm()
        ours = gradients(causal_lm, logps)
        for name, gradient in plain_gradients.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2), name


@pytest.mark.parametrize(
    ("model_type", "own", "change"),
    [
        ("llama", {}, LogitChange()),
        ("cohere", {}, LogitChange(0.0625)),
        ("cohere2", {"logit_scale": 0.5}, LogitChange(0.5)),
        ("granite", {"logits_scaling": 8.0}, LogitChange(1 / 8)),
        ("granitemoehybrid", {"logits_scaling": 8.0}, LogitChange(1 / 8)),
        ("hyperclovax", {"logits_scaling": 0.5}, LogitChange(0.5)),
        ("falcon_h1", {"lm_head_multiplier": 0.25}, LogitChange(0.25)),
        ("minicpm3", {"hidden_size": 2560, "dim_model_base": 320}, LogitChange(0.125)),
        ("gemma2", {}, LogitChange(1.0, 30.0)),
        ("gemma3_text", {}, LogitChange()),
        ("recurrent_gemma", {"logits_soft_cap": 20.0}, LogitChange(1.0, 20.0)),
        ("xlstm", {"output_logit_soft_cap": 15.0}, LogitChange(1.0, 15.0)),
    ],
)
def test_changes_of_logits_are_read(model_type: str, own: dict[str, Any], change: LogitChange) -> None:
    assert logit_change(AutoConfig.for_model(model_type, **own)) == change


def test_the_model_changes_the_logits_of_its_own_forward() -> None:
    """Samples are drawn by the model's own forward, through the head without targets."""
    causal_lm = model_of("gemma2", WINDOWED["gemma2"], 4)
    ids = torch.arange(3, 15)[None]
    expected = causal_lm(ids).logits
    model = packed(causal_lm)
    assert isinstance(causal_lm.get_output_embeddings(), LogpHead)
    with model.unpacked() as unpacked:
        torch.testing.assert_close(unpacked(ids).logits, expected, rtol=0, atol=1e-5)


def test_a_window_that_the_mask_lacks_is_an_error() -> None:
    causal_lm = model_of("gpt_oss", WINDOWED["gpt_oss"], 20)
    causal_lm.model.layers[0].self_attn.sliding_window = 4
    with pytest.raises(ConfigError, match="its mask does not have") as raised:
        packed(causal_lm)(pack_unkeyed(random_pairs(SHAPES)))
    assert "window 4" in raised.value.got
    with pytest.raises(ConfigError, match="its mask does not have"):  # so that the check at start finds it
        packed(causal_lm)(pack_unkeyed(random_pairs([(2, 2, 1)])))


def test_a_bias_of_positions_is_an_error() -> None:
    causal_lm = model_of("llama", {})
    attention = causal_lm.model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, position_bias=torch.ones(1), **kwargs)
    with pytest.raises(ConfigError, match="position_bias"):
        packed(causal_lm)(pack_unkeyed(random_pairs(SHAPES)))
