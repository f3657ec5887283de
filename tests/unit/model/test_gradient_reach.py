"""Several processes train a model only if each sequence uses all of its trained weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.attention import PACKED
from dpo_dist.model.exactness import CheckedModel, check_use
from dpo_dist.model.layers import compressors, join_gradients
from dpo_dist.model.packed import PackedCausalLM
from tests.support.families import FAMILIES, PADDED, tiny_family
from tests.support.packing import VOCABULARY

CPU = torch.device("cpu")


def checked(causal_lm: Any) -> CheckedModel:
    arrangement = FAMILIES.get(causal_lm.config.model_type, ({}, PACKED))[1]
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=arrangement).train()
    return CheckedModel(model, model, CPU, 64)


@pytest.mark.parametrize("model_type", ["gpt_oss", "jamba"])
def test_a_model_that_always_uses_all_weights_is_trained(model_type: str) -> None:
    check_use(checked(tiny_family(model_type, VOCABULARY)))


@pytest.mark.parametrize("used_by_long", [True, False])
def test_a_model_of_which_some_sequences_skip_a_layer_is_refused(used_by_long: bool) -> None:
    causal_lm = tiny_family("olmo3", VOCABULARY)
    mlp = causal_lm.model.layers[1].mlp
    compute = mlp.forward
    mlp.forward = lambda hidden: compute(hidden) if (hidden.shape[-2] > 8) is used_by_long else hidden
    with pytest.raises(ConfigError, match="several processes") as raised:
        check_use(checked(causal_lm))
    assert "model.layers.1.mlp.gate_proj.weight" in raised.value.got
    assert "layers.0" not in raised.value.got


class Experts(nn.Module):
    """The second one computes in long sequences only."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = self.experts
        return first(hidden) + (second(hidden) if hidden.shape[-2] > 8 else 0.0)


def test_a_list_of_experts_that_a_short_sequence_does_not_visit_is_refused() -> None:
    causal_lm = tiny_family("olmo3", VOCABULARY)
    causal_lm.model.layers[1].mlp = Experts(causal_lm.config.hidden_size)
    with pytest.raises(ConfigError, match="several processes"):
        check_use(checked(causal_lm))


def test_weights_that_are_not_trained_may_be_skipped() -> None:
    causal_lm = tiny_family("olmo3", VOCABULARY)
    mlp = causal_lm.model.layers[1].mlp.requires_grad_(False)
    compute = mlp.forward
    mlp.forward = lambda hidden: compute(hidden) if hidden.shape[-2] > 8 else hidden
    check_use(checked(causal_lm))


def test_a_forward_with_gradients_that_fails_is_refused() -> None:
    causal_lm = tiny_family("olmo3", VOCABULARY)

    def refuse(_module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            raise RuntimeError("no gradients here")

    causal_lm.model.layers[0].register_forward_hook(refuse)
    with pytest.raises(ConfigError, match="several processes") as raised:
        check_use(checked(causal_lm))
    assert "no gradients here" in raised.value.got


def test_compressors_of_keys_are_used_by_short_sequences_too() -> None:
    causal_lm = tiny_family("deepseek_v4", VOCABULARY)
    assert FAMILIES["deepseek_v4"][1] is PADDED
    with pytest.raises(ConfigError, match="several processes"):
        check_use(checked(causal_lm))
    for block in compressors(causal_lm):
        join_gradients(block)
    check_use(checked(causal_lm))
