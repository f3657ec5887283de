"""The numerics profile of stored log-probs, and deterministic kernels."""

import functools
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.attention import Heads, check_kernel
from dpo_dist.model.numerics import (
    NUMERICS_FIELDS,
    TOLERABLE_FIELDS,
    check_precision,
    deterministic_kernels,
    numerics_of,
)
from tests.support.kernels import flash_attn_varlen_func, put_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32 = ModelConfig(dtype=Dtype.fp32)


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package, and a GPU."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 9.1.2")
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: h200)


def test_profiles_differ_where_log_probs_can() -> None:
    fp32 = numerics_of(FP32, AttentionBackend.sdpa, CPU)
    assert fp32 != numerics_of(ModelConfig(), AttentionBackend.sdpa, CPU)
    assert fp32 != numerics_of(FP32, AttentionBackend.varlen, CPU)
    compiled = ModelConfig(dtype=Dtype.fp32, compile=True)
    assert fp32 != numerics_of(compiled, AttentionBackend.sdpa, CPU)
    checkpointed = ModelConfig(dtype=Dtype.fp32, gradient_checkpointing="full")
    assert fp32 == numerics_of(checkpointed, AttentionBackend.sdpa, CPU)


@pytest.mark.usefixtures("_installed")
def test_a_profile_names_the_version_of_every_kernel() -> None:
    assert numerics_of(FP32, AttentionBackend.sdpa, CPU)["cpu"] == torch.backends.cpu.get_cpu_capability()
    flash = numerics_of(ModelConfig(), AttentionBackend.flash_attention_2, CPU)
    assert flash["flash_attn"] == "flash-attn 9.1"
    assert "flash_attn" not in numerics_of(ModelConfig(), AttentionBackend.varlen, CPU)
    liger = numerics_of(ModelConfig(liger=True), AttentionBackend.varlen, CUDA)
    assert (liger["liger"], liger["gpu"]) == ("liger-kernel 9.1", "sm_90 with 132 multiprocessors")
    quantized = numerics_of(ModelConfig(quantization=Quantization.nf4), AttentionBackend.sdpa, CPU)
    assert quantized["quantization"] == "nf4 by bitsandbytes bitsandbytes 9.1"


def test_a_patch_release_changes_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    before = numerics_of(FP32, AttentionBackend.sdpa, CPU)
    for package in (torch, transformers):
        monkeypatch.setattr(package, "__version__", f"{'.'.join(package.__version__.split('.')[:2])}.99")
    assert numerics_of(FP32, AttentionBackend.sdpa, CPU) == before


@pytest.mark.usefixtures("_installed")
def test_the_list_of_fields_is_complete_and_rounding_alone_is_tolerable() -> None:
    everything = ModelConfig(dtype=Dtype.fp16, quantization=Quantization.int8, compile=True, liger=True)
    torch.use_deterministic_algorithms(True)
    try:
        profiles = [numerics_of(everything, AttentionBackend.flash_attention_2, d) for d in (CPU, CUDA)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert profiles[0].keys() | profiles[1].keys() == NUMERICS_FIELDS.keys()
    assert NUMERICS_FIELDS.keys() - TOLERABLE_FIELDS == {
        "dtype",
        "matmul_precision",
        "bf16_reduction",
        "fp16_reduction",
        "quantization",
    }


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
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="this CPU does not compute in fp16"):
        check_precision(Dtype.fp16, CPU)


def test_pytorch_cublas_and_flash_attn_use_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    heads = Heads(6, 2, 40)

    @functools.wraps(flash_attn_varlen_func)
    def record(*args: Any, deterministic: bool, **options: Any) -> Tensor:
        asked.append(deterministic)
        return flash_attn_varlen_func(*args, deterministic=deterministic, **options)

    put_kernels(monkeypatch, flash_attn=record)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    check_kernel(AttentionBackend.flash_attention_2, CPU, heads, torch.float32)
    with deterministic_kernels(True):
        check_kernel(AttentionBackend.flash_attention_2, CPU, heads, torch.float32)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert numerics_of(FP32, AttentionBackend.sdpa, CPU)["deterministic"] == "true"
    assert (asked[0], asked[-1]) == (False, True)


@pytest.mark.parametrize("callers", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_callers_choice_of_kernels_is_restored(callers: bool, wanted: bool) -> None:
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
