"""The numerics profile of stored log-probs, and deterministic kernels."""

import contextlib
import functools
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig

from dpo_dist.config.schema import AttentionBackend, Dtype, FusedLayers, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.attention.kernels import check_kernel
from dpo_dist.model.numerics import (
    check_precision,
    deterministic_kernels,
    numerics_profile,
)
from tests.support.kernels import flash_attn_varlen_func, put_kernels
from tests.support.precision import HAS_FP16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32 = ModelConfig(dtype=Dtype.fp32)
profile_of = functools.partial(numerics_profile, has_experts=False)


def test_a_profile_differs_where_log_probs_can(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32 = profile_of(FP32, AttentionBackend.sdpa, FusedLayers.none, CPU)
    assert fp32["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert profile_of(ModelConfig(), AttentionBackend.sdpa, FusedLayers.none, CPU) != fp32
    assert profile_of(FP32, AttentionBackend.varlen, FusedLayers.none, CPU) != fp32
    assert profile_of(FP32, AttentionBackend.sdpa, FusedLayers.compile, CPU) != fp32
    checkpointed = ModelConfig(dtype=Dtype.fp32, gradient_checkpointing="full")
    assert profile_of(checkpointed, AttentionBackend.sdpa, FusedLayers.none, CPU) == fp32
    for package in (torch, transformers):  # a patch release changes nothing
        monkeypatch.setattr(package, "__version__", f"{'.'.join(package.__version__.split('.')[:2])}.99")
    assert profile_of(FP32, AttentionBackend.sdpa, FusedLayers.none, CPU) == fp32


def test_experts_that_are_quantized_with_the_base_make_it_another_reference() -> None:
    quantized = replace(FP32, quantization=Quantization.nf4)
    for config in (FP32, quantized):
        dense, mixture = (
            numerics_profile(config, AttentionBackend.sdpa, FusedLayers.none, CPU, has_experts=has_experts)
            for has_experts in (False, True)
        )
        assert (dense != mixture) is (config is quantized)


def test_a_profile_names_every_kernel_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 9.1.2")
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: h200)
    everything = ModelConfig(dtype=Dtype.fp16, quantization=Quantization.int8)
    with deterministic_kernels(True):
        found = {
            name: value
            for device in (CPU, CUDA)
            for fused in (FusedLayers.liger, FusedLayers.compile)
            for name, value in profile_of(
                everything, AttentionBackend.flash_attention_2, fused, device
            ).items()
        }
    assert found["flash_attn"] == "flash-attn 9.1"
    assert (found["liger"], found["gpu"]) == ("liger-kernel 9.1", "sm_90 with 132 multiprocessors")
    assert (found["quantization"], found["bitsandbytes"]) == ("int8", "bitsandbytes 9.1")
    precisions = "dtype matmul_precision bf16_reduction fp16_reduction quantization bitsandbytes"
    kernels = "attention flash_attn compile liger deterministic device gpu cuda cpu torch transformers"
    assert found.keys() == {*precisions.split(), *kernels.split()}


def test_the_kernels_of_recurrent_layers_are_named_for_models_that_may_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = FP32, AttentionBackend.sdpa, FusedLayers.none
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h200)
    without = [numerics_profile(*plain, device) for device in (CPU, CUDA)]
    assert [numerics_profile(*plain, device, recurrent=True) for device in (CPU, CUDA)] == without
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.1")
    on_cpu, on_gpu = (numerics_profile(*plain, device, recurrent=True).keys() for device in (CPU, CUDA))
    assert on_cpu == without[0].keys()
    assert on_gpu - without[1].keys() == {"fla-core", "mamba-ssm", "causal-conv1d"}


def test_a_precision_that_the_device_lacks_is_an_error_with_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ConfigError, match="Tesla V100-SXM2-32GB does not compute in bf16") as error:
        check_precision(Dtype.bf16, CUDA)
    assert error.value.remedy == "set model.dtype=fp16, or fp32"
    check_precision(Dtype.fp16, CUDA)
    check_precision(Dtype.bf16, CPU)
    with (
        contextlib.nullcontext() if HAS_FP16 else pytest.raises(ConfigError, match="does not compute in fp16")
    ):
        check_precision(Dtype.fp16, CPU)


@pytest.mark.slow
def test_pytorch_cublas_and_flash_attn_use_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @functools.wraps(flash_attn_varlen_func)
    def record(*args: Any, deterministic: bool, **options: Any) -> Tensor:
        asked.append(deterministic)
        return flash_attn_varlen_func(*args, deterministic=deterministic, **options)

    put_kernels(monkeypatch, flash_attn=record)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    check_kernel(AttentionBackend.flash_attention_2, CPU, LlamaConfig(), torch.float32)
    with deterministic_kernels(True):
        check_kernel(AttentionBackend.flash_attention_2, CPU, LlamaConfig(), torch.float32)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert profile_of(FP32, AttentionBackend.sdpa, FusedLayers.none, CPU)["deterministic"] == "true"
    assert (asked[0], asked[-1]) == (False, True)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_callers_choice_of_kernels_is_restored(wanted: bool) -> None:
    callers = not wanted
    torch.use_deterministic_algorithms(callers, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        with deterministic_kernels(wanted):
            assert torch.are_deterministic_algorithms_enabled() is wanted
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled() is callers
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory is fill
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_share_of_experts_in_nf4_is_another_reference_and_one_in_int8_the_same() -> None:
    def of(kind: Quantization, sharing: int) -> dict[str, str]:
        config = ModelConfig(dtype=Dtype.bf16, quantization=kind)
        kernels = AttentionBackend.sdpa, FusedLayers.none, CPU
        return numerics_profile(config, *kernels, has_experts=True, sharing=sharing)

    pytest.importorskip("bitsandbytes")
    assert of(Quantization.nf4, 2) != of(Quantization.nf4, 1)
    assert of(Quantization.int8, 2) == of(Quantization.int8, 1)
