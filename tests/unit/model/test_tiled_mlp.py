"""MLPs in tiles compute the same log-probs and gradients, and keep the activations of one tile."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dpo_dist.config.schema import AdapterConfig, AdapterVariant, Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import ARCHITECTURES
from dpo_dist.model.layers import checkpoint_layers
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.model.memory import tile_mlps
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.tiny_model import write_model
from tests.unit.model.test_architectures import gradients, packed, tiny_causal_lm, tiny_config, trained_config

BATCH = pack_unkeyed(random_pairs([(7, 5, 9), (1, 1, 4), (12, 3, 3)]))
CPU = torch.device("cpu")


def tiled(causal_lm: Any, tokens: int) -> Any:
    tile_mlps(causal_lm, tokens)
    return causal_lm


def has_experts(model_type: str) -> bool:
    return "moe" in model_type or model_type in ("deepseek_v3", "gpt_oss", "mixtral")


@pytest.mark.parametrize("model_type", sorted(t for t in ARCHITECTURES if t != "opt" and not has_experts(t)))
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_tiles_change_no_log_prob_and_no_gradient(model_type: str, checkpointing: str) -> None:
    """MLPs with a gate and without, with biases (gpt2, phi, starcoder2), and with fused matrices (phi3)."""
    plain = packed(tiny_causal_lm(trained_config(model_type))).train()
    expected_logps = plain(BATCH)
    expected = gradients(plain.causal_lm, expected_logps)
    largest = max(gradient.norm() for gradient in expected.values())
    for tokens in (1, 7, len(BATCH.input_ids) - 1, 1000):
        model = packed(tiled(tiny_causal_lm(trained_config(model_type)), tokens)).train()
        checkpoint_layers(model.causal_lm, checkpointing)
        logps = model(BATCH)
        torch.testing.assert_close(logps, expected_logps, rtol=1e-6, atol=1e-6)
        ours = gradients(model.causal_lm, logps)
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            difference = (ours[name] - gradient).norm()
            # A bias of keys has no gradient but rounding: its own norm is no measure.
            assert difference <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name


def test_weights_that_are_not_trained_get_no_gradient() -> None:
    model = packed(tiled(tiny_causal_lm(tiny_config("qwen2")), 4)).train()
    model.requires_grad_(False)
    layers = model.causal_lm.model.layers
    layers[0].mlp.up_proj.weight.requires_grad_(True)
    layers[1].mlp.down_proj.weight.requires_grad_(True)
    found = gradients(model.causal_lm, model(BATCH))
    plain = packed(tiny_causal_lm(tiny_config("qwen2"))).train()
    expected = gradients(plain.causal_lm, plain(BATCH))
    assert set(found) == {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiled") / "model", hidden_size=64)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("quantization", "adapter"),
    [
        (None, AdapterConfig(r=4, alpha=8)),
        (None, AdapterConfig(r=4, alpha=8, target_modules=["up_proj"], variant=AdapterVariant.dora)),
        (None, AdapterConfig(r=4, alpha=8, target_modules=["q_proj"])),
        (Quantization.nf4, AdapterConfig(r=4, alpha=8)),
        (Quantization.nf4, AdapterConfig(r=4, alpha=8, variant=AdapterVariant.dora)),
        (Quantization.int8, AdapterConfig(r=4, alpha=8)),
    ],
)
def test_tiles_change_no_gradient_of_an_adapter(
    quantization: Quantization | None, adapter: AdapterConfig, checkpointing: str, folder: Path
) -> None:
    """On the MLP or beside it, over quantized weights or not; one tile has the tokens of several, or all."""
    if quantization is not None:
        pytest.importorskip("bitsandbytes")

    def trained(tokens: int | None) -> tuple[Tensor, dict[str, Tensor]]:
        config = ModelConfig(
            str(folder),
            dtype=Dtype.fp32,
            adapter=adapter,
            quantization=quantization,
            gradient_checkpointing=checkpointing,
            mlp_tile_tokens=tokens,
        )
        model = load_packed(folder, config, 64, CPU)
        add_adapter(model, config, 0)
        torch.manual_seed(0)
        for name, weight in model.train().named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        logps = model(BATCH)
        return logps.detach(), gradients(model.causal_lm, logps)

    expected_logps, expected = trained(None)
    largest = max(gradient.norm() for gradient in expected.values())
    for tokens in (7, 1000):
        logps, ours = trained(tokens)
        torch.testing.assert_close(logps, expected_logps, rtol=1e-6, atol=1e-5)
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * largest, name


def widest_saved(model: Any) -> int:
    """Return the largest last dimension of [tokens, width] that forward keeps, other than weights."""
    widths: list[int] = []
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.dim() == 3:
            widths.append(tensor.shape[-1])
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(BATCH)
    return max(widths)


def test_the_wide_activations_are_not_kept() -> None:
    config = tiny_config("qwen2", intermediate_size=500)
    assert widest_saved(packed(tiny_causal_lm(config)).train()) == 500
    assert widest_saved(packed(tiled(tiny_causal_lm(config), 4)).train()) < 500


def test_gradients_of_bf16_weights_are_added_in_float32() -> None:
    """Of 1,000 tiles of equal gradients; added in bf16, the sum would stop to grow at a few hundred."""
    causal_lm = tiled(tiny_causal_lm(tiny_config("qwen2")).bfloat16(), 1)
    mlp = causal_lm.model.layers[0].mlp
    hidden = torch.ones(1, 1000, causal_lm.config.hidden_size, dtype=torch.bfloat16)
    mlp(hidden).sum().backward()
    got = mlp.up_proj.weight.grad.float()
    mlp.zero_grad()
    mlp(hidden[:, :1]).sum().backward()
    torch.testing.assert_close(got, 1000 * mlp.up_proj.weight.grad.float(), rtol=0.02, atol=0.02)


def test_a_copy_computes_with_its_own_weights() -> None:
    mlp = tiled(tiny_causal_lm(tiny_config("qwen2")), 2).model.layers[0].mlp
    other = copy.deepcopy(mlp)
    nn.init.zeros_(other.down_proj.weight)
    hidden = torch.randn(1, 5, other.down_proj.out_features)
    assert mlp(hidden).abs().max() > 0
    assert other(hidden).abs().max() == 0


@pytest.mark.parametrize("model_type", sorted(t for t in ARCHITECTURES if t == "opt" or has_experts(t)))
def test_layers_with_experts_or_without_an_mlp_of_their_own_are_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match="no MLP that can be computed in tiles") as raised:
        tiled(tiny_causal_lm(trained_config(model_type)), 4)
    assert raised.value.where == "model.mlp_tile_tokens"


class Adding(nn.Module):
    """The residual is an input, as in BLOOM."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return residual + self.up(hidden)


class Listed(nn.Module):
    """Each token is computed alone, by one of several parts: an expert may get no tile at all."""

    def __init__(self, width: int):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = (part(hidden) for part in self.parts)
        return torch.where(hidden.sum(-1, keepdim=True) > 0, first, second)


@pytest.mark.parametrize("kind", [Adding, Listed])
def test_an_mlp_that_has_other_inputs_or_experts_is_refused(kind: type[nn.Module]) -> None:
    causal_lm = tiny_causal_lm(tiny_config("qwen2"))
    causal_lm.model.layers[1].mlp = kind(causal_lm.config.hidden_size)
    with pytest.raises(ConfigError, match="no MLP that can be computed in tiles"):
        tiled(causal_lm, 4)
