"""Modules trained in full beside an adapter: which, from which values, and as plain peft reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig
from dpo_dist.distributed.zero import _parameter_groups
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.adapter_files import check_start, trained_adapter
from dpo_dist.model.adapter_weights import read_adapter
from dpo_dist.model.flops import step_flops, without_weights
from dpo_dist.model.load import load_config, load_packed
from dpo_dist.model.lora import adapted_layers, adapter_off, add_adapter, load_adapter
from dpo_dist.model.packed import PackedCausalLM
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model
from tests.support.written import write_trained

PAIRS = random_pairs([(3, 4, 2), (5, 1, 6)])
BATCH = pack_unkeyed(PAIRS)
WHOLE = ["embed_tokens", "lm_head", "model.norm"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param)


def config_of(folder: Path, **adapter: Any) -> ModelConfig:
    chosen = {"modules_to_save": WHOLE, **adapter}
    return ModelConfig(str(folder), dtype=Dtype.fp32, adapter=AdapterConfig(**chosen))


def adapted(folder: Path, start: Path | None = None, **adapter: Any) -> PackedCausalLM:
    config = config_of(folder, path=None if start is None else str(start), **adapter)
    model = load_packed(folder, config, 64, torch.device("cpu"))
    add_adapter(model, config, 0, start)
    return model


def is_tied(folder: Path) -> bool:
    found: bool = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return found


@torch.no_grad()
def move(model: PackedCausalLM, scale: float = 0.1) -> None:
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(scale * torch.randn_like(weight))


def plain(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def of_peft(base: Path, adapter: Path) -> Tensor:
    return plain_logps(plain(base, adapter), PAIRS)


def saved_names(model: PackedCausalLM) -> set[str]:
    return {
        name.removeprefix("causal_lm.")
        for name, weight in model.named_parameters()
        if weight.requires_grad and ".lora_" not in name
    }


def test_only_copies_are_trained_and_the_start_is_the_base(folder: Path) -> None:
    base = load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, torch.device("cpu"))(BATCH)
    model = adapted(folder)
    assert torch.equal(model(BATCH), base)
    own = {"model.embed_tokens", "model.norm"} | (set() if is_tied(folder) else {"lm_head"})
    assert saved_names(model) == {f"{name}.modules_to_save.default.weight" for name in own}
    move(model)
    moved = model(BATCH)
    assert (moved - base).abs().max() > 0.01
    with adapter_off(model):
        assert torch.equal(model(BATCH), base)
    assert torch.equal(model(BATCH), moved)
    moved.sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == trained
    assert model.state_dict().keys() == trained
    matrices, others = _parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(others["params"]) == 1
    assert others["params"][0].dim() == 1


def test_plain_peft_computes_the_log_probs_of_training(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    move(model)
    weights = {name.removeprefix("causal_lm."): weight for name, weight in model.state_dict().items()}
    write_trained(model.causal_lm, weights, tmp_path / "out")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["modules_to_save"] == ["lm_head", "model.embed_tokens", "model.norm"]
    files = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name for name in files if ".lora_" not in name} == {
        f"base_model.model.{name}.weight" for name in written["modules_to_save"]
    }
    torch.testing.assert_close(of_peft(folder, tmp_path / "out"), model(BATCH), atol=1e-5, rtol=1e-5)
    scored = load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, torch.device("cpu"))
    load_adapter(scored, tmp_path / "out")
    torch.testing.assert_close(scored(BATCH), model(BATCH), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on_top", [False, True], ids=["continued", "on top"])
def test_an_sft_adapter_with_whole_modules_is_start_and_reference(
    on_top: bool, folder: Path, tmp_path: Path
) -> None:
    """peft gives embeddings and output layer of a tied base two copies, which are trained apart."""
    sft = write_sft_adapter(folder, tmp_path / "sft", modules_to_save=["embed_tokens", "lm_head"])
    assert_two(sft)
    started = of_peft(folder, sft)
    for saved in ([], ["embed_tokens", "lm_head"]):
        model = adapted(folder, sft, on_top=on_top, modules_to_save=saved, **({"r": 3} if on_top else {}))
        torch.testing.assert_close(model(BATCH), started, atol=1e-5, rtol=1e-5)
        assert len(saved_names(model)) == (0 if on_top and not saved else 2)
        before = model(BATCH)
        move(model, 0.03)
        with adapter_off(model):
            assert torch.equal(model(BATCH), before)
        weights = {name.removeprefix("causal_lm."): weight for name, weight in model.state_dict().items()}
        out = tmp_path / f"out{len(saved)}"
        below = read_adapter(sft) if on_top else None
        write_trained(model.causal_lm, weights, out, below)
        torch.testing.assert_close(of_peft(folder, out), model(BATCH), atol=1e-5, rtol=1e-5)
        assert (of_peft(folder, out) - started).abs().max() > 0.01


def assert_two(sft: Path) -> None:
    files = load_file(sft / "adapter_model.safetensors")
    pair = [files[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head")]
    assert not torch.equal(*pair)


def test_one_of_two_modules_that_share_a_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    if not is_tied(folder):
        assert len(saved_names(adapted(folder, modules_to_save=["lm_head"]))) == 1
        return
    with pytest.raises(ConfigError, match="share their weight") as refused:
        adapted(folder, modules_to_save=["lm_head"])
    assert refused.value.expected == "model.embed_tokens and lm_head"
    sft = write_sft_adapter(folder, tmp_path / "sft", modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="share their weight"):
        adapted(folder, sft, modules_to_save=[])


@pytest.mark.parametrize("name", ["head", "layers", "self_attn", "model"])
def test_a_module_without_weights_of_its_own_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not one of this model") as refused:
        adapted(folder, modules_to_save=[name])
    assert all(module in refused.value.expected for module in ("embed_tokens", "lm_head", "input_layernorm"))


def test_a_linear_layer_is_trained_in_full_or_has_matrices(folder: Path) -> None:
    model = adapted(folder, modules_to_save=["down_proj"])
    assert len(adapted_layers(model)) == 2 * 6
    assert len(saved_names(model)) == 2
    with pytest.raises(ConfigError, match="not a linear layer"):
        adapted(folder, modules_to_save=["mlp.down_proj"], target_modules=["down_proj"])


def test_the_modules_of_a_start_are_read_and_may_be_repeated(folder: Path, tmp_path: Path) -> None:
    sft = write_sft_adapter(folder, tmp_path / "sft", modules_to_save=["embed_tokens", "lm_head"])
    config = config_of(folder, path=str(sft), modules_to_save=[])
    found = trained_adapter(config, sft)
    assert found is not None
    assert found.modules_to_save == ["lm_head", "model.embed_tokens"]
    check_start(AdapterConfig(path=str(sft), modules_to_save=["lm_head", "embed_tokens"]), sft)
    with pytest.raises(ConfigError, match="has another modules_to_save"):
        check_start(AdapterConfig(path=str(sft), modules_to_save=["lm_head"]), sft)
    without = write_sft_adapter(folder, tmp_path / "without")
    with pytest.raises(ConfigError, match="has another modules_to_save"):
        check_start(AdapterConfig(path=str(without), modules_to_save=["lm_head"]), without)


def test_their_gradients_are_counted(folder: Path) -> None:
    counts = [
        step_flops(without_weights(load_config(folder, config)), config.adapter)
        for config in (config_of(folder, modules_to_save=[]), config_of(folder, target_modules=["q_proj"]))
    ]
    assert counts[1].per_target == 1.5 * counts[0].per_target
    some = config_of(folder, target_modules=["q_proj"], modules_to_save=["down_proj"])
    none = config_of(folder, target_modules=["q_proj"], modules_to_save=[])
    more, less = (
        step_flops(without_weights(load_config(folder, config)), config.adapter).per_token
        for config in (some, none)
    )
    assert more - less == 2 * 2 * 32 * 64
