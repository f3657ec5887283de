"""Several adapters as one: its precision, and the one scale that any loader reads."""

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dpo_dist.model.adapter_weights import AdapterWeights, stack


def part(layers: list[str], rank: int, alpha: int, dtype: torch.dtype, seed: int) -> AdapterWeights:
    """An adapter of layers with 8 inputs and 8 outputs."""
    torch.manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for layer in layers:
        weights[f"{layer}.lora_A.weight"] = torch.randn(rank, 8).to(dtype)
        weights[f"{layer}.lora_B.weight"] = torch.randn(8, rank).to(dtype)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)
    return AdapterWeights(config, frozenset(weights), weights.__getitem__)


def update(adapter: AdapterWeights, layer: str, scale: float | None = None) -> Tensor:
    """The update of a layer in float64, with the scale of the adapter or another one."""
    down, up = (adapter.read(f"{layer}.lora_{name}.weight").double() for name in "AB")
    return (adapter.scaling(layer, len(down)) if scale is None else scale) * (up @ down)


@pytest.fixture
def parts() -> list[tuple[float, AdapterWeights]]:
    """Other layers, ranks, scales and precisions; the first is the least precise."""
    return [
        (0.3, part(["x.q", "x.v"], 3, 5, torch.bfloat16, 1)),
        (0.7, part(["x.k", "x.v"], 2, 7, torch.float32, 2)),
    ]


def test_a_stack_is_the_sum_in_float32(parts: list[tuple[float, AdapterWeights]]) -> None:
    config, weights = stack(parts)
    stacked = AdapterWeights(config, frozenset(weights), weights.__getitem__)
    for layer in ("x.q", "x.k", "x.v"):
        wanted = sum(factor * update(one, layer) for factor, one in parts if layer in one.layers)
        torch.testing.assert_close(update(stacked, layer), wanted, rtol=1e-5, atol=1e-5)


def test_all_layers_of_a_stack_have_one_scale(parts: list[tuple[float, AdapterWeights]]) -> None:
    """Some loaders, such as vLLM's until 2026, read `lora_alpha` and `r` only, and no patterns."""
    config, weights = stack(parts)
    stacked = AdapterWeights(config, frozenset(weights), weights.__getitem__)
    assert config.r == 5  # the largest, for which such a loader makes room
    for layer in ("x.q", "x.k", "x.v"):
        torch.testing.assert_close(
            update(stacked, layer, config.lora_alpha / config.r), update(stacked, layer)
        )
