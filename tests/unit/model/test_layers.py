"""Activation checkpointing changes no gradient; options that cannot run are refused."""

import importlib.util
from collections import Counter

import pytest
import torch

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import AttentionBackend
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.layers import check_liger, checkpoint_layers, decoder_layers
from dpo_dist.model.packed import PackedCausalLM
from tests.support.families import FAMILIES, tiny_family
from tests.support.packing import VOCABULARY, pack_unkeyed, random_pairs
from tests.unit.model.test_architectures import gradients, packed, tiny_causal_lm, tiny_config, trained_config

BATCH = pack_unkeyed(random_pairs([(7, 5, 9), (1, 1, 4)]))
CUDA = torch.device("cuda")


def forwards(model: PackedCausalLM) -> list[int]:
    """Return the number of forwards of each layer in one forward and backward of the model."""
    counts: Counter[int] = Counter()
    layers = decoder_layers(model.causal_lm)
    handles = [
        next(layer.children()).register_forward_hook(lambda *_, n=number: counts.update([n]))
        for number, layer in enumerate(layers)
    ]
    model(BATCH).sum().backward()
    for handle in handles:
        handle.remove()
    return [counts[number] for number in range(len(layers))]


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "gpt_oss", "llama", "opt", "phimoe"])
def test_checkpointed_layers_recompute_without_changing_gradients(model_type: str) -> None:
    model = packed(tiny_causal_lm(trained_config(model_type, num_hidden_layers=3))).train()
    expected = gradients(model.causal_lm, model(BATCH))
    for choice, computed in (("none", [1, 1, 1]), (2, [1, 2, 1]), (3, [1, 1, 2]), ("full", [2, 2, 2])):
        checkpoint_layers(model.causal_lm, choice)
        assert forwards(model) == computed
        ours = gradients(model.causal_lm, model(BATCH))
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "model_type", sorted(name for name, (_, kind) in FAMILIES.items() if kind is not Arrangement.packed)
)
def test_layers_of_rows_recompute_without_changing_gradients(model_type: str) -> None:
    causal_lm = tiny_family(model_type, VOCABULARY, has_noise=False)
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded).train()
    expected = gradients(causal_lm, model(BATCH))
    if not decoder_layers(causal_lm):
        with pytest.raises(ConfigError, match="cannot checkpoint the layers of this architecture"):
            checkpoint_layers(causal_lm, "full")
        return
    checkpoint_layers(causal_lm, "full")
    ours = gradients(causal_lm, model(BATCH))
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5)


def test_scoring_recomputes_nothing() -> None:
    model = packed(tiny_causal_lm(tiny_config("qwen2"))).eval()
    checkpoint_layers(model.causal_lm, "full")
    assert forwards(model) == [1, 1]


def test_checkpointing_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer would be checkpointed") as raised:
        checkpoint_layers(tiny_causal_lm(tiny_config("qwen2")), 3)
    assert "2" in raised.value.expected


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="liger-kernel is not installed"):
        check_liger("qwen2", CUDA)


def test_liger_is_refused_for_an_architecture_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    check_liger("qwen2", CUDA)
    with pytest.raises(ConfigError, match="gpt2"):
        check_liger("gpt2", CUDA)
