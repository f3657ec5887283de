"""Checkpointing and offload change no gradient; text alone is trained; what cannot run is refused."""

import importlib.util
import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import AdapterConfig, Dtype, FusedLayers, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.exactness import StartCheck
from dpo_dist.model.files.load import load_packed, without_weights
from dpo_dist.model.layers import (
    check_device,
    checkpoint_layers,
    choose_fused,
    decoder_layers,
    offload_inputs,
    without_gradient,
)
from dpo_dist.model.lora import add_adapter, target_layers
from dpo_dist.model.numerics import deterministic_kernels
from dpo_dist.model.packed import PackedCausalLM
from tests.support.families import tiny_config, tiny_family
from tests.support.multimodal import IMAGE_MODELS, write_multimodal
from tests.support.packing import VOCABULARY, pack_unkeyed, plain_logps, random_pairs
from tests.unit.model.test_architectures import gradients, packed, trained

pytestmark = pytest.mark.slow

PAIRS = random_pairs([(7, 5, 9), (1, 1, 4)])
BATCH = pack_unkeyed(PAIRS)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def model_of(model_type: str, layers: int = 3) -> PackedCausalLM:
    return packed(trained(model_type, num_hidden_layers=layers)).train()


def forwards(model: PackedCausalLM) -> list[int]:
    """Return the number of forwards of each layer in one forward and backward of the model."""
    counts: Counter[int] = Counter()
    layers = decoder_layers(model.causal_lm)
    handles = [
        next(layer.children()).register_forward_hook(lambda *_, n=number: counts.update([n]))
        for number, layer in enumerate(layers)
    ]
    model(BATCH).sum().backward()
    for handle in handles:
        handle.remove()
    return [counts[number] for number in range(len(layers))]


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "gpt_oss", "llama", "opt", "phimoe"])
def test_checkpointed_layers_recompute_without_changing_gradients(model_type: str) -> None:
    model = model_of(model_type)
    expected = gradients(model.causal_lm, model(BATCH))
    for choice, computed in (("none", [1, 1, 1]), (2, [1, 2, 1]), (3, [1, 1, 2]), ("full", [2, 2, 2])):
        checkpoint_layers(model.causal_lm, choice)
        assert forwards(model) == computed
        torch.testing.assert_close(gradients(model.causal_lm, model(BATCH)), expected, rtol=1e-6, atol=1e-6)
    assert forwards(model.eval()) == [1, 1, 1]
    with pytest.raises(ConfigError, match="no layer would be checkpointed"):
        checkpoint_layers(model.causal_lm, 4)


@pytest.mark.parametrize(
    ("model_type", "choice", "moved_layers"),
    [("gpt2", "full", 4), ("gemma3_text", "full", 4), ("qwen2", 2, 2), ("mixtral", "full", 4)],
)
def test_inputs_of_checkpointed_layers_wait_in_host_memory(
    model_type: str, choice: int | str, moved_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same gradients, also of the losses of routers; scoring moves nothing."""
    sizes: list[int] = []
    empty, routes = torch.empty, model_type == "mixtral"

    def counted(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        if "pin_memory" in options and made.numel():
            sizes.append(made.nbytes)
        return made

    def compute(moves: bool) -> dict[str, Tensor]:
        model = model_of(model_type, 4)
        checkpoint_layers(model.causal_lm, choice)
        if moves:
            offload_inputs(model.causal_lm)
        with torch.no_grad():
            model.eval()(BATCH)
        found = model.train()(BATCH, with_routing=routes)
        return gradients(model.causal_lm, found[1] if routes else found)

    monkeypatch.setattr(torch, "empty", counted)
    expected = compute(moves=False)
    assert not sizes
    ours = compute(moves=True)
    assert sizes == [len(BATCH.input_ids) * 32 * 4] * moved_layers
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("fused", "text", "device", "fault"),
    [
        (FusedLayers.compile, {"model_type": "qwen2"}, CPU, r"C\+\+ compiler"),
        (FusedLayers.liger, {"model_type": "gpt2"}, CUDA, "Liger's kernels are exact only on CUDA"),
        (FusedLayers.liger, {"model_type": "llama", "hidden_act": "gelu"}, CUDA, "their usual activation"),
    ],
)
def test_options_that_cannot_run_are_refused(
    fused: FusedLayers,
    text: dict[str, str],
    device: torch.device,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_options: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=fault) as raised:
        check_device(ModelConfig(fused=fused), AutoConfig.for_model(**text), device)
    assert raised.value.where == "model.fused"


def test_all_options_that_cannot_run_are_named() -> None:
    config = ModelConfig(fused=FusedLayers.liger, activation_offload=True)
    with pytest.raises(ConfigError) as raised:
        check_device(config, AutoConfig.for_model("llama"), CPU)
    assert [fault.where for fault in raised.value.parts] == ["model.fused", "model.activation_offload"]


def test_auto_takes_liger_where_it_is_installed_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(model_type: str, device: torch.device = CUDA, **options: Any) -> str:
        trusting = ModelConfig(trust_remote_code=True)
        return choose_fused(trusting, AutoConfig.for_model(model_type, **options), device).value

    monkeypatch.setitem(sys.modules, "liger_kernel", importlib.import_module("types"))
    assert (chosen("qwen2"), chosen("gpt2"), chosen("qwen2", CPU)) == ("liger", "none", "none")
    assert (chosen("gemma2"), chosen("gemma2", hidden_activation="gelu")) == ("liger", "none")
    assert chosen("qwen2", auto_map={"AutoModelForCausalLM": "own.Own"}) == "none"
    with deterministic_kernels(True):
        assert chosen("qwen2") == "none"
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert chosen("qwen2") == "none"


def load(folder: Path) -> PackedCausalLM:
    return load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, CPU).eval()


@pytest.mark.parametrize("model_type", IMAGE_MODELS)
def test_a_model_that_reads_images_is_trained_by_its_text(model_type: str, tmp_path: Path) -> None:
    """Its log-probs are those of the whole model, of which the other parts are not kept in memory."""
    folder = write_multimodal(tmp_path, model_type, VOCABULARY)
    model = load(folder)
    StartCheck(model, model, CPU, 64).choose_arrangement()
    assert model.arrangement is Arrangement.packed
    assert model.has_chunked_head
    logps = model.train()(BATCH)
    logps.sum().backward()
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(whole, PAIRS), logps.detach(), rtol=0, atol=2e-5)
    ours, all_weights = (dict(one.named_parameters()) for one in (model.causal_lm, whole))
    assert all((weight.grad is not None) == weight.requires_grad for weight in ours.values())
    dropped = all_weights.keys() - ours.keys()
    assert ours.keys() < all_weights.keys()
    assert all("vis" in name or "multi_modal" in name for name in dropped)
    assert target_layers(model.causal_lm, AdapterConfig()) == target_layers(whole, AdapterConfig())


def test_a_class_of_text_alone_is_loaded_where_config_json_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a name, or with an unknown one, it is the class that has all parts."""
    folder = write_multimodal(tmp_path, "qwen3_5", VOCABULARY)
    described = json.loads((folder / "config.json").read_text())
    for named, found in (
        (["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM"),
        (None, "Qwen3_5ForConditionalGeneration"),
        (["Another"], "Qwen3_5ForConditionalGeneration"),
    ):
        (folder / "config.json").write_text(json.dumps(described | {"architectures": named}))
        with caplog.at_level(logging.WARNING):
            assert type(load(folder).causal_lm).__name__ == found
        assert ("only its text model is loaded" in caplog.text) is (found == "Qwen3_5ForCausalLM")
        caplog.clear()


def test_weights_for_images_of_a_model_with_one_configuration_are_frozen_and_get_no_adapter() -> None:
    sizes = {"image_size": 28, "patch_size": 14, "crop_size": 28}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    audio = {"hidden_size": 16, "intermediate_size": 24, "num_blocks": 1, "num_attention_heads": 2}
    config = tiny_config("phi4_multimodal", vision_config=vision | sizes, audio_config=audio)
    causal_lm = without_weights(config, ModelConfig("m", dtype=Dtype.fp32))
    frozen = {name for name, weight in causal_lm.named_parameters() if not weight.requires_grad}
    assert (
        frozen == {name for name, _ in causal_lm.named_parameters() if "embed_tokens_extend" in name} != set()
    )
    assert not any("embed_tokens_extend" in name for name in target_layers(causal_lm, AdapterConfig()))


@pytest.mark.parametrize("model_type", ["deepseek_v4", "llama4_text", "phimoe"])
def test_a_linear_layer_with_a_forward_of_its_own_gets_no_adapter(model_type: str) -> None:
    """Such as a router that returns several tensors."""
    model = packed(tiny_family(model_type))
    add_adapter(model, ModelConfig("m", adapter=AdapterConfig(r=2)), 0)
    model.arrange(Arrangement.padded, own_logits=False)
    assert model(BATCH).isfinite().all()


def test_choices_of_keys_get_no_adapter() -> None:
    """They have no gradient."""
    causal_lm = tiny_family("deepseek_v32")
    indexers = without_gradient(causal_lm)
    targets = {causal_lm.get_submodule(name).weight for name in target_layers(causal_lm, AdapterConfig())}
    assert 0 < len(indexers) < len(list(causal_lm.parameters()))
    assert targets
    assert not indexers & targets
