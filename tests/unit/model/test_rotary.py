"""Rotary frequencies are those of each response alone with its prompt, in a model that has seen no other."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dpo_dist.batching.pack import Sequences
from dpo_dist.batching.plan import Arrangement
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.unit.model.test_architectures import (
    assert_same,
    gradients,
    packed,
    shapes,
    tiny_causal_lm,
    tiny_config,
    with_rope,
)

LIMIT = 12
# Each model with its own module; layers of Gemma 3 have one of their kind each, Phi-MoE scales by length too.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"num_hidden_layers": 6},
    "gpt_neox": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 2, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}
# Pairs below the limit, above it, and on both sides; `LIMIT` tokens with and without the last one.
SHAPES = [(4, 3, 4), (7, 9, 2, 6), (1, 12, 11), (9, 3, 3, 4), (10, 6, 1)]


def model_of(model_type: str, rope_type: str) -> Any:
    config = with_rope(tiny_config(model_type, **MODELS[model_type]), rope_type, LIMIT)
    if model_type == "phimoe":
        config.rope_parameters |= {"short_mscale": 1.1, "long_mscale": 1.3}
    return tiny_causal_lm(config)


def expected_values(causal_lm: Any, pairs: list[Sequences]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probs and gradients of each response in a model that has seen no other sequence."""
    values, summed = [], {}
    for prompt, response in ((pair.prompt_ids, one) for pair in pairs for one in pair.responses):
        new = copy.deepcopy(causal_lm)
        values.append(plain_logps(new, [Sequences(prompt, (response,))]))
        for name, gradient in gradients(new, values[-1]).items():
            summed[name] = summed.get(name, 0) + gradient
    return torch.cat([value.detach() for value in values]), summed


def check(causal_lm: Any, pairs: list[Sequences], arrangement: Arrangement = Arrangement.packed) -> None:
    expected, expected_gradients = expected_values(causal_lm, pairs)
    model = packed(causal_lm).train()
    longest = max(len(pair.prompt_ids) + len(response) for pair in pairs for response in pair.responses)
    model.start_as(arrangement, longest)
    assert model.arrangement is (Arrangement.single if model.mixes_lengths(longest) else arrangement)
    for _ in range(2):  # whatever the forward before was
        logps = model(pack_unkeyed(pairs))
        assert (logps - expected).norm() <= 1e-6 * expected.norm()
    assert_same(gradients(causal_lm, logps), expected_gradients)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "yarn", "llama3", "linear"])
@pytest.mark.parametrize("model_type", MODELS)
def test_responses_on_both_sides_of_the_limit(model_type: str, rope_type: str) -> None:
    if model_type == "phimoe" and rope_type != "longrope":
        pytest.skip("has this kind only")
    check(model_of(model_type, rope_type), random_pairs(SHAPES))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@settings(max_examples=8, deadline=None)
@given(lengths=shapes)
def test_any_lengths(rope_type: str, lengths: list[tuple[int, ...]]) -> None:
    check(model_of("llama", rope_type), random_pairs(lengths))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_samples_are_drawn_as_by_transformers(rope_type: str) -> None:
    causal_lm = model_of("llama", rope_type)
    ids = torch.arange(3, 3 + LIMIT + 4)[None]
    expected = copy.deepcopy(causal_lm)(ids).logits
    model = packed(causal_lm)
    model.start_as(Arrangement.packed, 29)
    model(pack_unkeyed(random_pairs([(20, 9, 3)])))
    with model.unpacked() as unpacked:
        torch.testing.assert_close(unpacked(ids).logits, expected, rtol=0, atol=1e-5)
        unpacked(torch.ones(1, 40, dtype=torch.int64))
    pairs = random_pairs([(10, 6, 6)])
    logps, _ = expected_values(model_of("llama", rope_type), pairs)
    torch.testing.assert_close(model(pack_unkeyed(pairs)), logps, rtol=0, atol=1e-5)
