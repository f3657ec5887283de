"""Several adapters as one: its precision, and the one scale that any loader reads."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.adapter_weights import AdapterWeights, stack
from dpo_dist.model.merge import write_merged
from tests.support.tiny_model import write_model


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


def test_a_stack_of_rslora_has_the_scale_of_lora(parts: list[tuple[float, AdapterWeights]]) -> None:
    for _, one in parts:
        one.config.use_rslora = True
    config, weights = stack(parts)
    stacked = AdapterWeights(config, frozenset(weights), weights.__getitem__)
    for layer in ("x.q", "x.k", "x.v"):
        wanted = sum(factor * update(one, layer) for factor, one in parts if layer in one.layers)
        torch.testing.assert_close(update(stacked, layer), wanted, rtol=1e-5, atol=1e-5)


def test_patterns_name_the_ends_of_layers_as_in_peft() -> None:
    one = part(["x.q", "x.v", "x.vq"], 2, 6, torch.float32, 1)
    one.config.alpha_pattern = {"q": 10, r"x\.v": 4}
    layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "v", "vq")})
    model = inject_adapter_in_model(one.config, nn.ModuleDict({"x": layers}))
    for layer, alpha in (("x.q", 10), ("x.v", 4), ("x.vq", 6)):
        assert one.scaling(layer, 2) == alpha / 2 == model.get_submodule(layer).scaling["default"]


def test_a_layer_that_the_files_of_the_base_lack_is_an_error(tmp_path: Path) -> None:
    adapter = part(["model.layers.9.self_attn.q_proj"], 2, 6, torch.float32, 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="has layers that the files of its base do not") as raised:
        write_merged(tmp_path / "out", write_model(tmp_path / "base"), [(1.0, adapter)], str, None)
    assert "layers.9.self_attn.q_proj" in raised.value.got
