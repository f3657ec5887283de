"""The attention kernel of a run fits the device, and its results are checked first."""

import importlib.metadata
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, Gemma2Config, GPT2Config, MistralConfig, Qwen3Config

from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.attention import Heads, check_kernel, choose_backend, heads_of, scores_of
from tests.support.kernels import (
    flash_attn_varlen_func,
    put_kernels,
    top_left_flash,
    top_left_varlen,
    varlen_of_torch_2_11,
    varlen_of_torch_2_13,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUPED = Heads(6, 2, 40)
KERNELS = [AttentionBackend.varlen, AttentionBackend.flash_attention_2]


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of(monkeypatch, (8, 0))


def gpu_of(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")


def test_auto_is_a_backend_that_runs_on_the_device() -> None:
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CPU) is AttentionBackend.sdpa
    assert choose_backend(AttentionBackend.sdpa, Dtype.bf16, CUDA) is AttentionBackend.sdpa
    assert choose_backend(AttentionBackend.auto, Dtype.fp32, CUDA) is AttentionBackend.sdpa
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA) in KERNELS


def test_a_gpu_without_bf16_uses_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of(monkeypatch, (7, 5))
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA) is AttentionBackend.sdpa
    with pytest.raises(ConfigError, match="Ampere") as raised:
        choose_backend(AttentionBackend.varlen, Dtype.bf16, CUDA)
    assert "Tesla T4" in raised.value.got


@pytest.mark.parametrize("wanted", KERNELS)
def test_a_cuda_kernel_on_a_cpu_is_an_error(wanted: AttentionBackend) -> None:
    with pytest.raises(ConfigError, match="CUDA only"):
        choose_backend(wanted, Dtype.bf16, CPU)


def test_heads_are_those_of_the_model() -> None:
    assert heads_of(GPT2Config(n_embd=48, n_head=4)) == Heads(4, 4, 12)
    grouped = Qwen3Config(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=40)
    assert heads_of(grouped) == GROUPED
    low_rank = DeepseekV3Config(num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    assert heads_of(low_rank) == Heads(4, 4, 128 + 64, 128)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [GROUPED, Heads(3, 3, 64), Heads(4, 4, 24, 16)])
def test_a_correct_kernel_passes(
    backend: AttentionBackend, dtype: torch.dtype, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    for varlen in (varlen_of_torch_2_13, varlen_of_torch_2_11):
        put_kernels(monkeypatch, varlen)
        check_kernel(backend, CPU, heads, dtype)


def shifted(*args: Any, **options: Any) -> Tensor:
    right = varlen_of_torch_2_13(*args, **options)
    return torch.cat((right[1:], right[:1]))


class HalvesGradients(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def wrong_backward(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **options: Any) -> Tensor:
    halved: Tensor = HalvesGradients.apply(key)  # type: ignore[no-untyped-call]
    return varlen_of_torch_2_13(query, halved, value, *lengths, **options)


def fails_for_large_heads(query: Tensor, *args: Any, **options: Any) -> Tensor:
    if query.shape[-1] > 32:
        raise RuntimeError("head_dim should be at most 32\nat kernel.cu:1")
    return varlen_of_torch_2_13(query, *args, **options)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (shifted, "output differs"),
        (wrong_backward, "gradient of the key differs"),
        (fails_for_large_heads, "6 query and 2 key heads of 40 in bfloat16: RuntimeError: head_dim"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_refused_before_training(
    kernel: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kernels(monkeypatch, wraps(varlen_of_torch_2_13)(kernel))
    with torch.no_grad(), pytest.raises(ConfigError) as raised:
        check_kernel(AttentionBackend.varlen, CPU, GROUPED, torch.bfloat16)
    assert message in raised.value.got
    assert "model.attention=sdpa" in raised.value.remedy


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_whose_mask_begins_at_the_first_key_is_refused(
    backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kernels(monkeypatch, wraps(varlen_of_torch_2_13)(top_left_varlen), top_left_flash)
    with pytest.raises(ConfigError) as raised:
        check_kernel(backend, CPU, GROUPED, torch.bfloat16)
    assert "output differs" in raised.value.got


@pytest.mark.parametrize("installed", [{}, {"flash-attn-4": "4.0"}, {"flash-attn": "2.8"}])
def test_flash_attn_2_is_told_from_its_successor_with_the_same_module(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    wanted = AttentionBackend.flash_attention_2
    if "flash-attn" in installed:
        assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA) is wanted
        assert choose_backend(wanted, Dtype.bf16, CUDA) is wanted
        return
    assert choose_backend(AttentionBackend.auto, Dtype.bf16, CUDA) is AttentionBackend.varlen
    with pytest.raises(ConfigError, match="flash-attn 2 is not installed"):
        choose_backend(wanted, Dtype.bf16, CUDA)


def ignores_the_window(*args: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    return varlen_of_torch_2_13(*args, window_size=(-1, 0), **options)


def test_the_kernel_is_checked_with_the_windows_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, windowed = scores_of(Qwen3Config()), scores_of(MistralConfig(sliding_window=4096))
    put_kernels(monkeypatch, wraps(varlen_of_torch_2_13)(ignores_the_window))
    check_kernel(AttentionBackend.varlen, CPU, GROUPED, torch.bfloat16, plain)
    with pytest.raises(ConfigError) as raised:
        check_kernel(AttentionBackend.varlen, CPU, GROUPED, torch.bfloat16, windowed)
    assert "a sliding window: its output differs" in raised.value.got
    put_kernels(monkeypatch)
    check_kernel(AttentionBackend.varlen, CPU, GROUPED, torch.bfloat16, windowed)


def test_the_kernel_is_checked_with_the_capped_scores_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    put_kernels(monkeypatch)
    kinds = scores_of(Gemma2Config(attn_logit_softcapping=0.5))
    assert [(kind.window is None, kind.softcap) for kind in kinds] == [(True, 0.5), (False, 0.5)]
    check_kernel(AttentionBackend.flash_attention_2, CPU, GROUPED, torch.float32, kinds)
    ignores = wraps(flash_attn_varlen_func)(
        lambda *args, softcap, **options: flash_attn_varlen_func(*args, softcap=0.0, **options)
    )
    put_kernels(monkeypatch, flash_attn=ignores)
    with pytest.raises(ConfigError) as raised:
        check_kernel(AttentionBackend.flash_attention_2, CPU, GROUPED, torch.float32, kinds)
    assert "capped scores" in raised.value.got
