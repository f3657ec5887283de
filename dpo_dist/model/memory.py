"""Inputs of checkpointed layers in host memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.layers import decoder_layers

_OFFLOAD_KEY = "model.activation_offload"


def check_offload(device: torch.device) -> None:
    """Check that activations are in another memory than the host's.

    Raises:
        ConfigError: they are not.
    """
    if device.type != "cuda":
        raise ConfigError(
            "activations are in host memory already, so there is nothing to move",
            where=_OFFLOAD_KEY,
            got=f"true on {device.type}",
            expected="a GPU",
            remedy=f"set {_OFFLOAD_KEY}=false",
        )


def offload_inputs(causal_lm: nn.Module) -> None:
    """Make checkpointed layers keep their input in host memory.

    Args:
        causal_lm: a transformers model, after `checkpoint_layers`.
    """
    layers: list[Any] = decoder_layers(causal_lm)
    for layer in layers:
        checkpoint = layer._gradient_checkpointing_func  # of layers that keep their activations: not called
        layer._gradient_checkpointing_func = partial(_checkpointed, checkpoint)


def _checkpointed(checkpoint: Callable[..., Any], *arguments: Any) -> Any:
    # The checkpoint saves its tensor arguments under these hooks, and what its layer saves under its own.
    with save_on_cpu(pin_memory=True):
        return checkpoint(*arguments)
