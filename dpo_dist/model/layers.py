"""What is done to the decoder layers of a loaded model: which recompute their activations in backward."""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_dist.errors import ConfigError


def decoder_layers(causal_lm: nn.Module) -> list[nn.Module]:
    """The layers of the body in their order; transformers marks them as what can be checkpointed."""
    return [module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(causal_lm: Any, every: int | str) -> None:
    """Let decoder layers keep their input only and compute their activations again in backward.

    Args:
        causal_lm: a transformers model.
        every: `none`, `full` (every layer), or n: the n-th layer, the 2n-th, and so on.

    Raises:
        ConfigError: the model has fewer than n layers.
    """
    if every == "none":
        return
    layers: list[Any] = decoder_layers(causal_lm)
    distance = 1 if every == "full" else int(every)
    if distance > len(layers):
        raise ConfigError(
            "no layer would be checkpointed",
            where="model.gradient_checkpointing",
            got=f"every {distance}. layer of a model with {len(layers)}",
            expected=f"none, full, or a number from 2 to {len(layers)}",
            remedy="set model.gradient_checkpointing=none",
        )
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, layer in enumerate(layers, start=1):
        layer.gradient_checkpointing = number % distance == 0
