"""What a model's time goes to, counted from its configuration, is what its weights say."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from dpo_dist.model import cost
from dpo_dist.model.cost import compute_costs, layer_parameters
from dpo_dist.model.load import EXACT_MODEL_TYPES
from tests.unit.test_architectures import tiny_causal_lm, tiny_config


def matrix_parameters(causal_lm: Any) -> float:
    """Of all layers, as many as a token meets: of stacked experts, the chosen share."""
    chosen = getattr(causal_lm.config, "num_experts_per_tok", 0)
    return sum(
        parameter.numel() / (len(parameter) / chosen if parameter.dim() == 3 else 1)
        for name, parameter in causal_lm.base_model.named_parameters()
        if parameter.dim() > 1 and "embed" not in name and "wte" not in name and "wpe" not in name
    )


@pytest.mark.parametrize("model_type", sorted(EXACT_MODEL_TYPES))
def test_layers_are_counted_as_they_are(model_type: str) -> None:
    config = tiny_config(model_type)
    usual = AutoConfig.for_model(model_type).to_dict()
    for name in ("num_key_value_heads", "intermediate_size"):
        if name not in usual:
            delattr(config, name)
    counted = layer_parameters(config) * config.num_hidden_layers
    # What is not counted: the matrix that chooses experts.
    assert counted == pytest.approx(matrix_parameters(tiny_causal_lm(config)), rel=0.025)


def test_costs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_ATTENTION_SLOWNESS", 2.0)
    monkeypatch.setattr(cost, "_HEAD_SLOWNESS", 1.5)
    shape = {
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "vocab_size": 100,
    }
    costs = compute_costs(SimpleNamespace(model_type="qwen2", **shape))
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 20
    assert costs.key == pytest.approx(2 * (4 * 8) / (2 * layer))
    assert costs.target == pytest.approx(1.5 * (8 * 100 * 8) / (3 * layer * 6))


def test_attention_is_as_dear_as_all_else_in_very_long_sequences_only() -> None:
    qwen7b = AutoConfig.for_model(
        "qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    costs = compute_costs(qwen7b)
    assert 5_000 < 1 / costs.key < 40_000
    assert 0.05 < costs.target < 0.2
