"""Every family is exact: dense models, experts, states, windows, chunks, caps, sinks, scales."""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import AttentionBackend, FusedLayers, ModelConfig
from dpo_dist.data.example import Example
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import (
    SAMPLING_ROUTERS,
    check_causal,
    length_warnings,
    recorded_arrangement,
    switch_off_noise,
)
from dpo_dist.model.attention.kernels import PACKED
from dpo_dist.model.attention.ulysses import check_shared_tokens
from dpo_dist.model.exactness import StartCheck
from dpo_dist.model.files.load import load_config
from dpo_dist.model.layers import checkpoint_layers
from dpo_dist.model.packed import PackedCausalLM, rope_limit
from tests.support.families import FAMILIES, tiny_causal_lm, tiny_config, with_rope
from tests.support.packing import branching, pack_unkeyed, plain_logps, random_pairs

pytestmark = pytest.mark.slow

MULTIPLIERS = {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}
# Windows of all layers or of some, beside layers of full attention. `FAMILIES` has others, of 8 tokens.
WINDOWED: dict[str, dict[str, Any]] = {
    "cohere2": {"num_hidden_layers": 4},
    "gemma2": {"attn_logit_softcapping": 1.0},
    "gemma3_text": {"final_logit_softcapping": 3.0, "num_hidden_layers": 6},
    "gpt_oss": {},
    "llama4_text": {"num_hidden_layers": 4},
    "mistral": {},
    "mixtral": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [0, 1]},
    "starcoder2": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    # Experts beside a dense MLP.
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
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


def trained(model_type: str, **own: Any) -> Any:
    """A model without noise in training, as a loaded one is."""
    config = tiny_config(model_type, **own)
    switch_off_noise(config)
    return tiny_causal_lm(config)


def windowed(model_type: str, window: int | None) -> Any:
    name = "attention_chunk_size" if model_type == "llama4_text" else "sliding_window"
    options = {**WINDOWED, **OTHERS}.get(model_type, {}) | ({name: window} if window else {})
    return tiny_causal_lm(tiny_config(model_type, **options))


def packed(causal_lm: Any) -> PackedCausalLM:
    causal_lm.config._attn_implementation = PACKED
    return PackedCausalLM(causal_lm, AttentionBackend.sdpa)


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


def settled(causal_lm: Any) -> PackedCausalLM:
    """Arranged as the check at start finds it exact."""
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded)
    StartCheck(model, model, torch.device("cpu"), 64).choose_arrangement()
    return model


def check_exact(
    causal_lm: Any,
    pairs: Sequence[Example],
    arranged: Callable[[Any], PackedCausalLM] = packed,
) -> PackedCausalLM:
    expected = plain_logps(causal_lm, pairs)
    expected_gradients = gradients(causal_lm, expected)
    model = arranged(causal_lm)
    logps = model(pack_unkeyed(pairs))
    assert (logps - expected).norm() <= 1e-6 * expected.norm()
    assert_same(gradients(causal_lm, logps), expected_gradients)
    return model


@pytest.mark.parametrize(("model_type", "own"), [*((name, {}) for name in sorted(FAMILIES)), *OTHERS.items()])
def test_log_probs_and_gradients_equal_plain_ones(model_type: str, own: dict[str, Any]) -> None:
    """Also if layers are computed again in backward, which happens in training mode."""
    causal_lm, pairs = trained(model_type, **own), branching(random_pairs(SHAPES))
    assert len(pack_unkeyed(pairs).input_ids) < len(pack_unkeyed(pairs, None).input_ids)
    check_causal(causal_lm.config)
    model = check_exact(causal_lm, pairs, settled)
    assert (model.arrangement, model.own_logits) == (FAMILIES[model_type][1], False)
    assert recorded_arrangement(model_type) in (Arrangement.packed, model.arrangement)
    expected = gradients(causal_lm, model(pack_unkeyed(pairs)))
    if model_type not in SAMPLING_ROUTERS:
        checkpoint_layers(causal_lm, "full")
        assert_same(gradients(causal_lm, model.train()(pack_unkeyed(pairs))), expected)


@pytest.mark.parametrize("model_type", WINDOWED)
@settings(max_examples=4)
@given(window=st.integers(2, 16), lengths=shapes)
def test_windows_of_any_length(model_type: str, window: int, lengths: list[tuple[int, ...]]) -> None:
    check_exact(windowed(model_type, window), branching(random_pairs(lengths)))


@pytest.fixture
def compiling() -> Iterator[None]:
    """Empty what torch.compile leaves in modules of models, where test_others_code.py would find it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    for module in [module for name, module in sys.modules.items() if ".modeling_" in name]:
        for name in vars(module):
            if name.startswith("__compiled_fn_"):
                vars(module)[name] = None


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_compiled_layers_with_windows_caps_and_sinks_are_exact(model_type: str) -> None:
    """Of several layouts, as those traced for any number of tokens must not keep the masks of the first.

    Recomputed in backward, too; and no further layout is traced again. The kernels are PyTorch's own.
    """
    causal_lm = windowed(model_type, 4)
    batches = [
        branching(random_pairs(lengths)) for lengths in (SHAPES, [(9, 5, 2, 1, 7)], [(3, 12), (20, 1, 1)])
    ]
    expected = [plain_logps(causal_lm, pairs) for pairs in batches]
    expected_gradients = [gradients(causal_lm, logps) for logps in expected]
    torch._dynamo.utils.counters.clear()
    causal_lm.config._attn_implementation = PACKED
    checkpoint_layers(causal_lm, "full")
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, FusedLayers.compile).train()
    for pairs, plain, plain_gradients in zip(batches, expected, expected_gradients, strict=True):
        logps = model(pack_unkeyed(pairs))
        assert (logps - plain).norm() <= 1e-6 * plain.norm()
        assert_same(gradients(causal_lm, logps), plain_gradients)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for tokens in (6, 11):
        gradients(causal_lm, model(pack_unkeyed(random_pairs([(tokens, tokens, 2 * tokens)]))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("heads", "possible"), [((28, 4), {1, 2, 4, 28}), ((32, 8), {1, 2, 4, 8, 16, 32}), ((6, 6), {1, 2, 3, 6})]
)
def test_ranks_that_cannot_divide_the_heads_are_an_error(heads: tuple[int, int], possible: set[int]) -> None:
    sizes = {"hidden_size": heads[0] * 8, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    config = LlamaConfig(**sizes)
    for ranks in range(1, 40):
        if ranks in possible:
            check_shared_tokens(config, ranks)
            continue
        with pytest.raises(ConfigError, match="divided among so many ranks"):
            check_shared_tokens(config, ranks)


def test_a_window_that_the_mask_lacks_is_an_error() -> None:
    causal_lm = windowed("gpt_oss", 20)
    causal_lm.model.layers[0].self_attn.sliding_window = 4
    for lengths in (SHAPES, [(2, 2, 1)]):  # also of short sequences, so that the check at start finds it
        with pytest.raises(ValueError, match="is not the window of its mask"):
            packed(causal_lm)(pack_unkeyed(random_pairs(lengths)))


@pytest.mark.parametrize(
    ("model_type", "scaling"),
    [
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
    assert length_warnings(config, 65) == []
    (warning,) = length_warnings(config, 66)
    assert warning.startswith("data.max_length=66 is more than the model's 64 positions")


# Rotary frequencies are those of each response alone with its prompt, in a model that has seen no other.
LIMIT = 12
# Each model with its own module; layers of Gemma 3 have one of their kind each, Phi-MoE scales by length too.
ROTARY: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_hidden_layers": 6},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}
ROTATED = [
    *(("llama", rope_type) for rope_type in ("dynamic", "longrope", "yarn", "llama3", "linear")),
    *(("gemma3_text", rope_type) for rope_type in ("dynamic", "longrope", "yarn")),
    ("gpt_neox", "dynamic"),
    ("phi3", "longrope"),
    ("phimoe", "longrope"),
]
# Pairs below the limit, above it, and on both sides; `LIMIT` tokens with and without the last one.
AROUND = [(4, 3, 4), (7, 9, 2, 6), (1, 12, 11), (9, 3, 3, 4), (10, 6, 1)]


def model_of(model_type: str, rope_type: str) -> Any:
    config = with_rope(tiny_config(model_type, **ROTARY.get(model_type, {})), rope_type, LIMIT)
    if model_type == "phimoe":
        config.rope_parameters |= {"short_mscale": 1.1, "long_mscale": 1.3}
    return tiny_causal_lm(config)


def expected_values(causal_lm: Any, pairs: list[Example]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probs and gradients of each response in a model that has seen no other sequence."""
    values, summed = [], {}
    for prompt, response in ((pair.prompt_ids, one) for pair in pairs for one in pair.responses):
        new = copy.deepcopy(causal_lm)
        values.append(plain_logps(new, [Example(prompt, (response,))]))
        for name, gradient in gradients(new, values[-1]).items():
            summed[name] = summed.get(name, 0) + gradient
    return torch.cat([value.detach() for value in values]), summed


def check_as_new(causal_lm: Any, pairs: list[Example]) -> None:
    expected, expected_gradients = expected_values(causal_lm, pairs)
    model = packed(causal_lm).train()
    longest = max(len(pair.prompt_ids) + len(response) for pair in pairs for response in pair.responses)
    model.arrange_as_recorded(Arrangement.packed, longest)
    assert (model.arrangement is Arrangement.single) is model.exceeds_rope_limit(longest)
    for _ in range(2):  # whatever the forward before was
        logps = model(pack_unkeyed(pairs))
        assert (logps - expected).norm() <= 1e-6 * expected.norm()
    assert_same(gradients(causal_lm, logps), expected_gradients)


@pytest.mark.parametrize(("model_type", "rope_type"), ROTATED)
def test_responses_on_both_sides_of_the_limit(model_type: str, rope_type: str) -> None:
    check_as_new(model_of(model_type, rope_type), random_pairs(AROUND))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_samples_are_drawn_as_by_transformers(rope_type: str) -> None:
    causal_lm = model_of("llama", rope_type)
    ids = torch.arange(3, 3 + LIMIT + 4)[None]
    expected = copy.deepcopy(causal_lm)(ids).logits
    model = packed(causal_lm)
    model.arrange_as_recorded(Arrangement.packed, 29)
    model(pack_unkeyed(random_pairs([(20, 9, 3)])))
    with model.unpacked() as unpacked:
        torch.testing.assert_close(unpacked(ids).logits, expected, rtol=0, atol=1e-5)
        unpacked(torch.ones(1, 40, dtype=torch.int64))
    pairs = random_pairs([(10, 6, 6)])
    logps, _ = expected_values(model_of("llama", rope_type), pairs)
    torch.testing.assert_close(model(pack_unkeyed(pairs)), logps, rtol=0, atol=1e-5)
