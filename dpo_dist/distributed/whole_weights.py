"""Whole weights of a trained model, collected in the host memory of rank 0."""

from typing import Any

import torch
from torch import Tensor


def whole_weights(engine: Any, is_main: bool) -> dict[str, Tensor] | None:
    """Return all trained weights of a DeepSpeed engine on rank 0, None on the others; collective.

    Only rank 0 makes a copy in host memory.
    """
    if engine.zero_optimization_partition_weights():
        gathered: dict[str, Tensor] | None = engine._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=True
        )
        return gathered if is_main else None
    return _on_host(engine.module.state_dict()) if is_main else None


def _on_host(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy each tensor out of the buffer that DeepSpeed keeps them in; tied weights stay one tensor."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in weights.values():
        if (tensor.data_ptr(), tensor.shape) not in copies:
            copies[tensor.data_ptr(), tensor.shape] = tensor.detach().to("cpu", copy=True)
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}
