"""Checkpointing and offload change no gradient; text alone is trained; what cannot run is refused."""

import importlib.util
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.exactness import StartCheck
from dpo_dist.model.layers import (
    check_device,
    checkpoint_layers,
    decoder_layers,
    offload_inputs,
    other_weights,
    without_gradient,
)
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import target_layers
from dpo_dist.model.packed import PackedCausalLM
from tests.support.families import tiny_family
from tests.support.multimodal import write_multimodal
from tests.support.packing import VOCABULARY, pack_unkeyed, plain_logps, random_pairs
from tests.unit.model.test_architectures import gradients, packed, trained

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
    ("option", "kind", "device", "fault"),
    [
        ("compile", "qwen2", CPU, r"C\+\+ compiler"),
        ("liger", "gpt2", CUDA, "Liger's kernels are exact on CUDA"),
    ],
)
def test_options_that_cannot_run_are_refused(
    option: str, kind: str, device: torch.device, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_options: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=fault) as raised:
        check_device(ModelConfig(**{option: True}), kind, device)
    assert raised.value.where == f"model.{option}"


def load(folder: Path) -> PackedCausalLM:
    return load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, CPU).eval()


@pytest.mark.parametrize(
    ("model_type", "arrangement", "others"),
    [
        ("gemma3", Arrangement.packed, True),
        ("qwen3_5", Arrangement.padded, False),
    ],
)
def test_a_model_that_reads_images_is_trained_by_its_text_and_exported(
    model_type: str, arrangement: Arrangement, others: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_multimodal(tmp_path / "base", model_type, VOCABULARY)
    with caplog.at_level(logging.WARNING):
        model = load(folder)
    assert ("only its text model is loaded" in caplog.text) is not others
    StartCheck(model, model, CPU, 64).settle()
    assert model.arrangement is arrangement
    logps = model.train()(BATCH)
    logps.sum().backward()
    unused = other_weights(model.causal_lm)
    assert bool(unused) is others
    assert all(weight.grad is None for weight in unused)
    model.causal_lm.save_pretrained(tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(again, PAIRS), logps.detach(), rtol=0, atol=2e-5)
    if others:
        base, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "exported"))
        assert base.keys() == exported.keys()


def test_choices_of_keys_get_no_adapter() -> None:
    """They have no gradient."""
    causal_lm = tiny_family("deepseek_v32")
    indexers = without_gradient(causal_lm)
    targets = {causal_lm.get_submodule(name).weight for name in target_layers(causal_lm, AdapterConfig())}
    assert 0 < len(indexers) < len(list(causal_lm.parameters()))
    assert targets
    assert not indexers & targets
