"""Inputs of checkpointed layers wait elsewhere, and gradients stay the same bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.layers import check_offload, checkpoint_layers, offload_inputs
from dpo_dist.model.packed import PackedCausalLM
from tests.support.packing import pack_unkeyed, random_pairs
from tests.unit.model.test_architectures import gradients, packed, tiny_causal_lm, trained_config

BATCH = pack_unkeyed(random_pairs([(7, 5, 9), (1, 1, 4)]))
LAYERS = 4


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each tensor that goes to the host's memory."""
    sizes: list[int] = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        if "pin_memory" in options and made.numel():
            sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", counted)
    return sizes


def model_of(model_type: str, choice: int | str) -> PackedCausalLM:
    model = packed(tiny_causal_lm(trained_config(model_type, num_hidden_layers=LAYERS))).train()
    checkpoint_layers(model.causal_lm, choice)
    return model


@pytest.mark.parametrize(
    ("model_type", "choice", "layers"),
    [("gpt2", "full", LAYERS), ("gemma3_text", "full", LAYERS), ("qwen2", 2, LAYERS // 2)],
)
def test_the_input_of_each_checkpointed_layer_is_moved_and_gradients_are_equal(
    model_type: str, choice: int | str, layers: int, moved: list[int]
) -> None:
    plain = model_of(model_type, choice)
    expected = gradients(plain.causal_lm, plain(BATCH))
    model = model_of(model_type, choice)
    offload_inputs(model.causal_lm)
    logps = model(BATCH)
    size = len(BATCH.input_ids) * model.causal_lm.config.hidden_size * 4
    assert moved == [size] * layers
    ours = gradients(model.causal_lm, logps)
    assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())


def test_losses_of_routers_have_the_same_gradient() -> None:
    plain = model_of("mixtral", "full")
    expected = gradients(plain.causal_lm, plain(BATCH, with_routing=True)[1])
    model = model_of("mixtral", "full")
    offload_inputs(model.causal_lm)
    ours = gradients(model.causal_lm, model(BATCH, with_routing=True)[1])
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())


def test_scoring_moves_nothing(moved: list[int]) -> None:
    model = model_of("qwen2", "full")
    offload_inputs(model.causal_lm)
    with torch.no_grad():
        model.eval()(BATCH)
    assert not moved


def test_a_cpu_has_no_other_memory() -> None:
    check_offload(torch.device("cuda"))
    with pytest.raises(ConfigError, match="in host memory already") as raised:
        check_offload(torch.device("cpu"))
    assert raised.value.where == "model.activation_offload"
