"""Options of decoder layers: activation checkpointing, torch.compile, Liger's kernels."""

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_dist.errors import ConfigError
from dpo_dist.model.architectures import ARCHITECTURES
from dpo_dist.model.optional_packages import check_liger_kernel
from dpo_dist.model.text_part import text_part


def decoder_layers(causal_lm: Any) -> list[nn.Module]:
    """Return the decoder layers of text in order: the modules that transformers can checkpoint."""
    modules = text_part(causal_lm).modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(causal_lm: Any, every: int | str) -> None:
    """Make decoder layers keep only their input and recompute their activations in backward.

    Args:
        causal_lm: a transformers model.
        every: `none`, `full` (every layer), or n: layers n, 2n, and so on, counted from 1.

    Raises:
        ConfigError: the model has fewer than n layers, or none that transformers can checkpoint.
    """
    if every == "none":
        return
    layers: list[Any] = decoder_layers(causal_lm)
    if not layers:
        raise ConfigError(
            "transformers cannot checkpoint the layers of this architecture",
            where="model.gradient_checkpointing",
            got=f"{every} for {causal_lm.config.model_type}",
            remedy="set model.gradient_checkpointing=none",
        )
    distance = 1 if every == "full" else int(every)
    if distance > len(layers):
        raise ConfigError(
            "no layer would be checkpointed",
            where="model.gradient_checkpointing",
            got=f"every {distance} layers of a model with {len(layers)}",
            expected=f"none, full, or a number from 2 to {len(layers)}",
            remedy="set model.gradient_checkpointing=none",
        )
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, layer in enumerate(layers, start=1):
        layer.gradient_checkpointing = number % distance == 0


def check_compiler(device: torch.device) -> None:
    """Check for the compiler of torch.compile, which would otherwise fail in the first forward.

    Raises:
        ConfigError: Triton on CUDA, or a C++ compiler on a CPU, is not installed.
    """
    if device.type == "cuda":
        needed, found = "Triton", importlib.util.find_spec("triton") is not None
    else:
        needed, found = "a C++ compiler", shutil.which(os.environ.get("CXX", "g++")) is not None
    if not found:
        raise ConfigError(
            f"torch.compile needs {needed}, which is not installed",
            where="model.compile",
            got=f"true on {device.type}",
            remedy=f"install {needed}, or set model.compile=false",
        )


def compile_layers(causal_lm: nn.Module) -> None:
    """Compile the parts of each decoder layer with torch.compile, for any number of tokens.

    The layer itself is not compiled: checkpointing is part of its forward, and prevents compilation.
    """
    for layer in decoder_layers(causal_lm):
        for part in layer.children():
            part.compile(dynamic=True)


def check_liger(model_type: str, device: torch.device) -> None:
    """Check that Liger's kernels can run on `device` and are exact for this architecture.

    Raises:
        ConfigError: they cannot, they are not, or liger-kernel is not installed.
    """
    architecture = ARCHITECTURES.get(model_type)
    if device.type != "cuda":
        reason = f"Liger's kernels run on CUDA only, and this is {device.type}"
    elif architecture is None or not architecture.is_exact_with_liger:
        reason = f"Liger's kernels are not known to be exact for {model_type}"
    else:
        check_liger_kernel()
        return
    exact = sorted(name for name, known in ARCHITECTURES.items() if known.is_exact_with_liger)
    raise ConfigError(
        "Liger's kernels cannot be used",
        where="model.liger",
        got=reason,
        expected=f"CUDA and one of {', '.join(exact)}",
        remedy="set model.liger=false",
    )


def use_liger(causal_lm: nn.Module) -> None:
    """Replace norms, rotary embedding and gated MLP of this model by Liger's kernels.

    Liger's losses are not used: the log-prob head never computes all logits. The rotary embedding is a
    function that models of one architecture share, so it is replaced for all of them in this process.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # noqa: PLC0415  (optional extra)

    _apply_liger_kernel_to_instance(causal_lm, cross_entropy=False, fused_linear_cross_entropy=False)
