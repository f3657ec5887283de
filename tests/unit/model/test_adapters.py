"""LoRA adapters: their layers, their training, and the base without them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    AttentionBackend,
    Dtype,
    ModelConfig,
    Quantization,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import adapted_layers, adapter_off, add_adapter, load_adapter
from dpo_dist.model.packed import LogpHead, PackedCausalLM
from tests.support.families import tiny_family
from tests.support.packing import VOCABULARY, pack_unkeyed, random_pairs
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
BATCH = pack_unkeyed(random_pairs([(3, 4, 2), (5, 1, 6)]))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param)


def adapted(folder: Path, seed: int = 0, **adapter: object) -> PackedCausalLM:
    config = ModelConfig(str(folder), dtype=Dtype.fp32, adapter=AdapterConfig(**adapter))
    model = load_packed(folder, config, 64, torch.device("cpu"))
    add_adapter(model, config, seed)
    return model


def adapted_names(model: PackedCausalLM) -> set[str]:
    layers = adapted_layers(model)
    return {name for name, module in model.causal_lm.named_modules() if module in layers}


def test_all_linear_is_every_linear_layer_except_the_head(folder: Path) -> None:
    model = adapted(folder)
    names = adapted_names(model)
    assert len(names) == 2 * len(LINEAR)
    assert {name.rpartition(".")[2] for name in names} == LINEAR
    assert type(model.causal_lm.get_output_embeddings()) is LogpHead


def test_a_target_matches_the_end_of_a_layers_name(folder: Path) -> None:
    names = adapted_names(adapted(folder, target_modules=["mlp.up_proj", "model.layers.1.self_attn.q_proj"]))
    assert names == {f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)} | {
        "model.layers.1.self_attn.q_proj"
    }


def test_targets_are_saved_in_one_order(folder: Path) -> None:
    """peft keeps them as a set, whose order differs between processes."""
    config = adapted(folder, target_modules=["v_proj", "q_proj", "k_proj"]).causal_lm.peft_config["default"]
    assert config.target_modules == sorted(config.target_modules)


def test_a_pattern_of_targets_stays_one(folder: Path, tmp_path: Path) -> None:
    sft = write_sft_adapter(folder, tmp_path / "sft", target_modules=r".*\.(q_proj|up_proj)")
    config = ModelConfig(str(folder), dtype=Dtype.fp32, adapter=AdapterConfig(path=str(sft)))
    model = load_packed(folder, config, 64, torch.device("cpu"))
    add_adapter(model, config, 0, sft)
    assert model.causal_lm.peft_config["default"].target_modules == r".*\.(q_proj|up_proj)"


@pytest.mark.parametrize("target", ["proj", "query", "lm_head", "embed_tokens"])
def test_an_unknown_target_is_refused_with_the_known_ones(folder: Path, target: str) -> None:
    with pytest.raises(ConfigError) as refused:
        adapted(folder, target_modules=["q_proj", target])
    assert refused.value.got == target
    assert all(name in refused.value.expected for name in LINEAR)


@pytest.mark.parametrize("targets", ["all-linear", ["q_b_proj", "gate_proj"]])
def test_layers_in_whose_place_peft_would_adapt_the_experts_are_refused(targets: str | list[str]) -> None:
    """The first layer's MLP and the shared experts of DeepSeek are linear layers with the experts' names."""
    causal_lm = tiny_family("deepseek_v3", VOCABULARY)
    names = {name.rpartition(".")[2] for name, layer in causal_lm.named_modules() if _is_linear(layer)}
    assert names >= {"gate_proj", "up_proj", "down_proj"}
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded)
    adapter = AdapterConfig(r=2, alpha=4, target_modules=targets)
    with pytest.raises(ConfigError, match="experts in place of") as raised:
        add_adapter(model, ModelConfig(adapter=adapter), 0)
    assert "gate_proj" in raised.value.got
    assert raised.value.remedy.endswith("[q_b_proj]") is (targets != "all-linear")
    own = AdapterConfig(r=2, alpha=4, target_modules=["q_a_proj", "q_b_proj", "o_proj"])
    add_adapter(model, ModelConfig(adapter=own), 0)
    assert len(adapted_layers(model)) == 6


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


@pytest.mark.parametrize("variant", AdapterVariant)
def test_an_untrained_or_disabled_adapter_changes_no_log_prob(folder: Path, variant: AdapterVariant) -> None:
    base = load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, torch.device("cpu"))(BATCH)
    model = adapted(folder, variant=variant)
    assert torch.equal(model(BATCH), base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    moved = model(BATCH)
    assert (moved - base).abs().max() > 0.01
    with adapter_off(model):
        assert torch.equal(model(BATCH), base)
    assert torch.equal(model(BATCH), moved)


def test_only_the_adapter_is_trained_and_in_the_state_dict(folder: Path) -> None:
    model = adapted(folder, variant=AdapterVariant.dora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 2 * len(LINEAR)
    assert all(".lora_" in name for name in trained)
    assert model.state_dict().keys() == trained
    with adapter_off(model):
        pass
    assert all(parameter.requires_grad is (".lora_" in name) for name, parameter in model.named_parameters())
    model(BATCH).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_only_the_seed_decides_an_adapters_initialization(folder: Path) -> None:
    torch.manual_seed(1)
    first = adapted(folder, seed=3).state_dict()
    state = torch.get_rng_state()
    again, other = adapted(folder, seed=3).state_dict(), adapted(folder, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_a_quantized_model_is_refused(folder: Path) -> None:
    config = ModelConfig(str(folder), dtype=Dtype.fp32, quantization=Quantization.nf4)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed") as refused:
        load_packed(folder, config, 64, torch.device("cpu"))
    assert "dpo-dist[quantization]" in refused.value.remedy


@pytest.mark.parametrize("on_top", [False, True], ids=["continued", "on top"])
def test_a_policy_and_its_start_are_base_and_adapter(on_top: bool, folder: Path, tmp_path: Path) -> None:
    sft = write_sft_adapter(folder, tmp_path / "sft")
    plain = load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, torch.device("cpu"))
    base = plain(BATCH)
    load_adapter(plain, sft)
    started = plain(BATCH)
    assert (started - base).abs().max() > 0.01
    config = ModelConfig(
        str(folder),
        dtype=Dtype.fp32,
        adapter=AdapterConfig(path=str(sft), on_top=on_top, r=3 if on_top else 16),
    )
    model = load_packed(folder, config, 64, torch.device("cpu"))
    add_adapter(model, config, 0, sft)
    assert torch.equal(model(BATCH), started)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".default." in name}
    assert len(trained) == 2 * 2 * (len(LINEAR) if on_top else 3)
    assert model.state_dict().keys() == trained
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    moved = model(BATCH)
    assert (moved - started).abs().max() > 0.01
    with adapter_off(model):
        assert torch.equal(model(BATCH), started)
    assert torch.equal(model(BATCH), moved)
    moved.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
