"""The optimizer that DeepSpeed wraps, and its parameter groups."""

from typing import Any

import torch
from torch import nn

from dpo_dist.config.optim_schema import OptimConfig, OptimizerKind
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.optional_packages import check_bitsandbytes
from dpo_dist.model.text_part import without_gradient

STATES_OF_ADAM = 2
"""Tensors of a weight's size that the optimizer keeps beside its master weight."""


def create_optimizer(model: PackedCausalLM, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW for the trained weights; Accelerate replaces an offloaded one by DeepSpeed's CPU Adam.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    groups, betas = _parameter_groups(model, optim.weight_decay), (optim.betas[0], optim.betas[1])
    if optim.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    check_bitsandbytes(optim.kind, "optim.kind", instead=OptimizerKind.adamw)
    from bitsandbytes import optim as bitsandbytes  # noqa: PLC0415  (optional)

    adamw: Any = bitsandbytes.AdamW8bit  # type: ignore[attr-defined]
    eight_bit: torch.optim.Optimizer = adamw(groups, lr=optim.lr, betas=betas, eps=optim.eps)
    return eight_bit


def _parameter_groups(model: PackedCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups with weight decay for matrices, and without for biases and norms.

    Weights without a gradient, as those of a vision tower, are not decayed either: they stay as they are.
    Under ZeRO-3 only `ds_shape` has the number of dimensions.
    """
    unmoved = without_gradient(model.causal_lm)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        is_decayed = dimensions > 1 and parameter not in unmoved
        (matrices if is_decayed else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
