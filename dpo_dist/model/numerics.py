"""The numerics profile: everything except weights and token ids that can change a log-prob.

The reference store looks up log-probs by this profile (law L3). Fields that do not apply are absent.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator

import torch
import transformers

from dpo_dist.config.schema import FLASH_ATTN, AttentionBackend, Dtype, FusedLayers, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.installed import is_installed

RECURRENT_KERNELS = ("fla-core", "mamba-ssm", "causal-conv1d")
"""Packages whose kernels transformers takes for recurrent layers, where they are installed."""


def numerics_profile(
    config: ModelConfig,
    backend: AttentionBackend,
    fused: FusedLayers,
    device: torch.device,
    *,
    recurrent: bool = False,
    has_experts: bool = False,
    sharing: int = 1,
) -> dict[str, str]:
    """Return the numerics profile of a model scored on `device`: its fields and their values.

    `backend` and `fused` are the chosen ones, never `auto`. `recurrent`: the model may have recurrent layers;
    `has_experts`: it is a mixture of experts, which `sharing` processes share.
    """
    profile = {
        "dtype": config.dtype.value,
        "attention": backend.value,
        "device": device.type,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "torch": _minor(torch.__version__),
        "transformers": _minor(transformers.__version__),
    }
    if backend in FLASH_ATTN:
        profile["flash_attn"] = _minor(importlib.metadata.version(FLASH_ATTN[backend]))
    if recurrent and device.type == "cuda":
        installed = filter(is_installed, RECURRENT_KERNELS)
        profile |= {name: _minor(importlib.metadata.version(name)) for name in installed}
    if torch.are_deterministic_algorithms_enabled():
        profile["deterministic"] = "true"
    if config.quantization is not None:
        profile["bitsandbytes"] = _minor(importlib.metadata.version("bitsandbytes"))
        parts = ", with the experts" if has_experts else ""
        # The scales of NF4 have scales of their own, for blocks that a share of the experts cuts elsewhere.
        if has_experts and sharing > 1 and config.quantization is Quantization.nf4:
            parts += f" of {sharing} processes"
        profile["quantization"] = f"{config.quantization}{parts}"
    if fused is FusedLayers.compile:
        profile["compile"] = "inductor"
    if fused is FusedLayers.liger:
        profile["liger"] = _minor(importlib.metadata.version("liger-kernel"))
    if device.type == "cuda":
        matmul = torch.backends.cuda.matmul
        # Libraries choose kernels by these properties, not by the GPU's product name.
        gpu = torch.cuda.get_device_properties(device)
        profile["gpu"] = f"sm_{gpu.major}{gpu.minor} with {gpu.multi_processor_count} multiprocessors"
        profile["cuda"] = str(torch.version.cuda)
        profile["bf16_reduction"] = str(matmul.allow_bf16_reduced_precision_reduction)
        if config.dtype is Dtype.fp16:
            profile["fp16_reduction"] = str(matmul.allow_fp16_reduced_precision_reduction)
    if device.type == "cpu":
        profile["cpu"] = torch.backends.cpu.get_cpu_capability()
    return profile


def _minor(version: str) -> str:
    """Return a version without its patch: "2.12" of "2.12.1+cu126"."""
    return ".".join(version.split("+", maxsplit=1)[0].split(".")[:2])


def has_products(dtype: Dtype) -> bool:
    """Return whether this CPU multiplies matrices in `dtype`; others emulate bf16, at an eighth of the speed.

    That of fp16 is the same check as DeepSpeed's.
    """
    if dtype is Dtype.bf16:
        return any(is_there and "bf16" in name for name, is_there in torch.cpu.get_capabilities().items())
    if dtype is Dtype.fp16:
        has_mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def check_precision(dtype: Dtype, device: torch.device) -> None:
    """Check that `device` supports `dtype`: a GPU bf16 without slow emulation, a CPU fp16."""
    if device.type == "cpu" and dtype is Dtype.fp16 and not has_products(dtype):
        raise ConfigError(
            "this CPU does not compute in fp16",
            where="model.dtype",
            got=str(dtype),
            remedy="set model.dtype=fp32, or bf16",
        )
    if device.type != "cuda" or dtype is not Dtype.bf16:
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} does not compute in bf16",
            where="model.dtype",
            got=str(dtype),
            remedy="set model.dtype=fp16, or fp32",
        )


@contextlib.contextmanager
def deterministic_kernels(is_on: bool) -> Iterator[None]:
    """Inside the block, if `is_on`, allow only kernels that repeat their results bit for bit.

    An operation without such a kernel raises an error. Enter the block before the first matrix product on a
    GPU, when cuBLAS reads its workspace configuration.
    """
    options = torch.utils.deterministic
    callers = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory  # type: ignore[attr-defined]
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(is_on)
    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Otherwise PyTorch fills every new tensor with NaN, which costs time and changes no result.
        options.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(callers[0], warn_only=warns_only)
        options.fill_uninitialized_memory = callers[1]  # type: ignore[attr-defined]
