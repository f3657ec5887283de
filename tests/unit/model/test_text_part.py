"""Models that read images train as their text does: other weights stay as they are, and are exported."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import AdapterConfig, AttentionBackend, Dtype, ModelConfig
from dpo_dist.distributed.zero import _parameter_groups
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.exactness import CheckedModel, settle
from dpo_dist.model.flops import step_flops, without_weights
from dpo_dist.model.layers import decoder_layers, other_weights, without_gradient
from dpo_dist.model.load import load_config, load_packed
from dpo_dist.model.lora import target_layers
from dpo_dist.model.packed import PackedCausalLM
from tests.support.families import SINGLE, tiny_family
from tests.support.multimodal import write_multimodal
from tests.support.packing import VOCABULARY, pack_unkeyed, plain_logps, random_pairs

CPU = torch.device("cpu")
PAIRS = random_pairs([(7, 5, 9), (1, 1, 4), (4, 3, 2, 6)])


def load(folder: Path) -> PackedCausalLM:
    return load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, CPU).eval()


@pytest.mark.parametrize(
    ("model_type", "arrangement", "others"),
    [
        ("gemma3", Arrangement.packed, True),
        ("qwen3_5", Arrangement.padded, False),
        ("llama4", Arrangement.packed, False),
    ],
)
def test_a_whole_model_is_trained_by_its_text_and_exported(
    model_type: str, arrangement: Arrangement, others: bool, tmp_path: Path
) -> None:
    folder = write_multimodal(tmp_path / "base", model_type, VOCABULARY)
    model = load(folder)
    settle(CheckedModel(model, model, CPU, 64))
    assert model.arrangement is arrangement
    model.train()
    logps = model(pack_unkeyed(PAIRS))
    logps.sum().backward()
    assert bool(other_weights(model.causal_lm)) is others
    assert all(weight.grad is None for weight in other_weights(model.causal_lm))
    model.causal_lm.save_pretrained(tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(again, PAIRS), logps.detach(), rtol=0, atol=2e-5)
    if others:
        base, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "exported"))
        assert base.keys() == exported.keys()


def test_weights_without_a_gradient_are_not_decayed(tmp_path: Path) -> None:
    model = load(write_multimodal(tmp_path / "base", "gemma3", VOCABULARY))
    decayed, others = _parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert other_weights(model.causal_lm) <= set(others["params"])
    assert not other_weights(model.causal_lm) & set(decayed["params"])


@pytest.mark.parametrize("model_type", ["deepseek_v4", "deepseek_v32"])
def test_choices_of_keys_are_not_trained(model_type: str) -> None:
    """Their weights have no gradient, get no adapter and do not decay; all others have one."""
    causal_lm = tiny_family(model_type, VOCABULARY)
    frozen = without_gradient(causal_lm)
    assert 0 < len(frozen) < len(list(causal_lm.parameters()))
    causal_lm(input_ids=torch.arange(3, 43)[None], use_cache=False).logits.sum().backward()
    assert {weight for weight in causal_lm.parameters() if weight.grad is None} == frozen
    decayed, _ = _parameter_groups(PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=SINGLE), 0.1)
    assert not frozen & set(decayed["params"])
    targets = {causal_lm.get_submodule(name).weight for name in target_layers(causal_lm, AdapterConfig())}
    assert targets
    assert not frozen & targets


def test_an_adapter_and_flops_are_of_text_alone(tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path / "base", "gemma3", VOCABULARY)
    model = load(folder)
    targets = target_layers(model.causal_lm, AdapterConfig(r=4, alpha=8.0))
    assert targets
    assert all("language_model" in name for name in targets)
    assert len(decoder_layers(model.causal_lm)) == 2
    batch = pack_unkeyed(PAIRS)
    with FlopCounterMode(display=False) as counter:
        model(batch)
    products = counter.get_flop_counts()["Global"]
    seen = sum(count for kind, count in products.items() if str(kind) in ("aten.mm", "aten.addmm"))
    flops = step_flops(without_weights(load_config(folder, ModelConfig())))
    assert flops.of(len(batch.input_ids), len(batch.targets), attended=0) / 3 == seen


def test_a_model_of_which_only_the_text_is_loaded_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(write_multimodal(tmp_path / "base", "qwen3_5", VOCABULARY))
    assert "only its text model is loaded (Qwen3_5ForCausalLM)" in caplog.text


def test_a_whole_model_without_a_class_for_text_is_one_error(tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path / "base", "mistral3", VOCABULARY)
    with pytest.raises(ConfigError, match="no causal language model of this architecture") as raised:
        load(folder)
    assert raised.value.got == "mistral3"


def test_a_model_of_text_has_no_other_weights() -> None:
    model = PackedCausalLM(
        tiny_family("gemma3_text", VOCABULARY), AttentionBackend.sdpa, arrangement=Arrangement.padded
    )
    assert not other_weights(model.causal_lm)
