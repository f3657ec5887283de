"""Options of layers change no result on a GPU."""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.config.schema import AttentionBackend, Dtype, FusedLayers, ModelConfig
from dpo_dist.model.architectures import EXACT_WITH_LIGER
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.flops import matmul_peak
from dpo_dist.model.layers import use_liger
from dpo_dist.model.states import check_recurrent_kernels
from tests.support.families import tiny_causal_lm, tiny_config, tiny_family
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.tiny_model import write_model
from tests.unit.model.test_architectures import gradients, packed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")
LENGTHS = [(70, 50, 90), (1, 1, 4), (12, 3, 1), (200, 30, 41)]
KERNELS = [
    pytest.param({"fused": FusedLayers.none}, id="none"),
    pytest.param({"fused": FusedLayers.compile}, id="compile"),
    pytest.param(
        {"fused": FusedLayers.liger},
        id="liger",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel"
        ),
    ),
]

DELTA_RULES = ("qwen3_5_text", "olmo_hybrid", "kimi_linear")
HAS_DELTA_KERNELS = importlib.util.find_spec("fla") is not None

OF_THEIR_OWN: dict[str, dict[str, Any]] = {
    "llama4_text": {"num_hidden_layers": 4},  # the last one without positions
    **{kind: {} for kind in ("gpt_oss", "gemma2", "gemma3n_text", "cohere2", "granite", "deepseek_v3")},
}
"""Layers with temperatures, sinks, caps, windows, shared keys, scales, low ranks."""


@pytest.fixture(autouse=True)
def layers_of_transformers() -> Iterator[None]:
    """Liger replaces classes and functions of transformers' modules for the whole process: put them back."""
    kinds = [name.removesuffix("_text") for name in EXACT_WITH_LIGER]
    modules = [importlib.import_module(f"transformers.models.{kind}.modeling_{kind}") for kind in kinds]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, members in zip(modules, before, strict=True):
        vars(module).update(members)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), hidden_size=256, layers=4)


@pytest.fixture(scope="module")
def batch() -> PackedBatch:
    return pack_unkeyed(random_pairs(LENGTHS)).to(CUDA)


def outcome(folder: Path, batch: PackedBatch, config: ModelConfig) -> list[Tensor]:
    """Log-probs of the batch and the gradients of their sum of squares."""
    model = load_packed(folder, config, 512, CUDA).to(CUDA).train()
    logps = model(batch)
    logps.square().sum().backward()
    return [logps.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("options", KERNELS)
@pytest.mark.parametrize("checkpointing", ["none", 2, "full"])
def test_float32_equals_the_plain_model(
    options: dict[str, FusedLayers], checkpointing: int | str, folder: Path, batch: PackedBatch
) -> None:
    expected = outcome(folder, batch, ModelConfig(dtype=Dtype.fp32, fused=FusedLayers.none))
    config = ModelConfig(dtype=Dtype.fp32, gradient_checkpointing=checkpointing, **options)
    got = outcome(folder, batch, config)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-4)
    for ours, plain in zip(got[1:], expected[1:], strict=True):
        assert (ours - plain).norm() <= 1e-5 * max(plain.norm(), 1.0)


def test_layer_inputs_that_wait_on_the_host_change_no_bit(folder: Path, batch: PackedBatch) -> None:
    """In two steps, so that memory of the first is used again; and the device keeps fewer of them."""
    kept: list[int] = []
    found: list[list[Tensor]] = []
    for offload in (False, True):
        config = ModelConfig(gradient_checkpointing="full", activation_offload=offload)
        model = load_packed(folder, config, 512, CUDA).to(CUDA).train()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            logps = model(batch)
            torch.cuda.synchronize()
            kept.append(torch.cuda.memory_allocated() - before)
            logps.square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    inputs = 4 * len(batch.input_ids) * 256 * 2  # layers, tokens, width, bytes
    assert kept[0] - kept[2] >= 0.9 * inputs
    assert all(torch.equal(ours, plain) for ours, plain in zip(found[1], found[0], strict=True))


@pytest.mark.parametrize("options", KERNELS)
def test_bf16_is_as_close_to_float32_as_the_plain_model(
    options: dict[str, FusedLayers], folder: Path, batch: PackedBatch
) -> None:
    none = FusedLayers.none
    exact = outcome(folder, batch, ModelConfig(dtype=Dtype.fp32, fused=none))[0]
    plain = outcome(folder, batch, ModelConfig(attention=AttentionBackend.sdpa, fused=none))[0]
    ours = outcome(folder, batch, ModelConfig(**options))[0]
    assert (ours - exact).abs().mean() <= 1.1 * (plain - exact).abs().mean() + 1e-3


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("model_type", sorted(EXACT_WITH_LIGER))
def test_liger_is_exact_for_every_listed_architecture(model_type: str) -> None:
    model = packed(tiny_causal_lm(tiny_config(model_type))).to(CUDA)
    small = pack_unkeyed(random_pairs([(7, 5, 9), (1, 1, 4)])).to(CUDA)
    logps = model(small)
    expected = gradients(model.causal_lm, logps)
    use_liger(model.causal_lm)
    torch.testing.assert_close(model(small), logps, rtol=0, atol=1e-5)
    ours = gradients(model.causal_lm, model(small))
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("model_type", OF_THEIR_OWN)
def test_layers_with_code_of_their_own_are_those_of_the_cpu(model_type: str) -> None:
    results = []
    for device in (torch.device("cpu"), CUDA):
        model = packed(tiny_causal_lm(tiny_config(model_type, **OF_THEIR_OWN[model_type]))).to(device)
        batch = pack_unkeyed(random_pairs([(7, 5, 9), (1, 1, 4), (12, 3, 2)])).to(device)
        logps = model(batch)
        results.append({"": logps.detach().cpu(), **gradients(model.causal_lm, logps)})
    expected, got = results
    for name, values in expected.items():
        assert (got[name].cpu() - values).norm() <= 1e-4 * max(values.norm(), 1.0), name


@pytest.mark.parametrize("kind", [*DELTA_RULES, "granitemoehybrid", "nemotron_h", "lfm2"])
def test_recurrent_layers_are_those_of_the_cpu(kind: str) -> None:
    if HAS_DELTA_KERNELS and kind in DELTA_RULES:
        pytest.skip("the kernels of flash-linear-attention do not run on CPUs")
    model, batch = packed(tiny_family(kind)), pack_unkeyed(random_pairs(LENGTHS))
    with torch.no_grad():
        expected = model(batch)
        on_gpu = model.to(CUDA)(batch.to(CUDA)).cpu()
    torch.testing.assert_close(on_gpu, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not HAS_DELTA_KERNELS, reason="needs flash-linear-attention")
@pytest.mark.parametrize("kind", DELTA_RULES)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_the_delta_kernels_pass_the_check_of_a_runs_start(kind: str, head_dim: int) -> None:
    causal_lm = packed(tiny_family(kind)).causal_lm
    for name in ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"):
        setattr(causal_lm.config, name, head_dim)
    check_recurrent_kernels(causal_lm, CUDA, torch.bfloat16)


def test_the_measured_peak_is_higher_in_bf16() -> None:
    assert matmul_peak(CUDA, torch.bfloat16) > matmul_peak(CUDA, torch.float32)
