"""Two adapters as one: its precision, and the one scale that any loader reads."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dpo_dist.model.adapter_weights import AdapterWeights, stack


def part(layers: list[str], rank: int, alpha: int, dtype: torch.dtype, seed: int) -> AdapterWeights:
    """An adapter of layers with 8 inputs and 8 outputs."""
    torch.manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for layer in layers:
        weights[f"{layer}.lora_A.weight"] = torch.randn(rank, 8).to(dtype)
        weights[f"{layer}.lora_B.weight"] = torch.randn(8, rank).to(dtype)
    return AdapterWeights(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), weights)


def update(adapter: AdapterWeights, layer: str, scale: float | None = None) -> Tensor | float:
    """The update of a layer in float64, with the scale of the adapter or another one."""
    if f"{layer}.lora_A.weight" not in adapter.weights:
        return 0.0
    down, up = (adapter.weights[f"{layer}.lora_{name}.weight"].double() for name in "AB")
    return (adapter.scaling(layer, len(down)) if scale is None else scale) * (up @ down)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_stack_is_the_sum_in_float32_with_one_scale(use_rslora: bool) -> None:
    """Of other layers, ranks, scales and precisions. Some loaders read no patterns."""
    above, below = (
        part(["x.q", "x.v"], 3, 5, torch.bfloat16, 1),
        part(["x.k", "x.v"], 2, 7, torch.float32, 2),
    )
    above.config.use_rslora = below.config.use_rslora = use_rslora
    stacked = stack(above, below)
    assert stacked.config.r == 5  # the largest, for which such a loader makes room
    for layer in ("x.q", "x.k", "x.v"):
        found = update(stacked, layer)
        torch.testing.assert_close(found, update(above, layer) + update(below, layer), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            update(stacked, layer, stacked.config.lora_alpha / stacked.config.r), found
        )


def test_patterns_name_the_ends_of_layers_as_in_peft() -> None:
    one = part(["x.q", "x.v", "x.vq"], 2, 6, torch.float32, 1)
    one.config.alpha_pattern = {"q": 10, r"x\.v": 4}
    layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "v", "vq")})
    model = inject_adapter_in_model(one.config, nn.ModuleDict({"x": layers}))
    for layer, alpha in (("x.q", 10), ("x.v", 4), ("x.vq", 6)):
        assert one.scaling(layer, 2) == alpha / 2 == model.get_submodule(layer).scaling["default"]
