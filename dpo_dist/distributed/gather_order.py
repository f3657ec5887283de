"""One recorded gather order per kind of forward, so that ZeRO-3 always prefetches the right weights.

DeepSpeed records the modules of one forward and of the backward after it, and then prefetches weights in that
order. It keeps one record per model. A forward that leaves it discards it, and recording it again takes two
forwards without prefetch and several collective comparisons. A policy has forwards of different orders: with
gradients, without them, and with its adapter off.
"""

import copy
from typing import Any

import torch

from dpo_dist.model.adapters import adapted_layers


def keep_gather_orders(engine: Any) -> None:
    """Keep one record per kind of forward of a new DeepSpeed engine; does nothing below ZeRO stage 3."""
    if not engine.zero_optimization_partition_weights():
        return
    offload = engine.optimizer.parameter_offload
    adapted, unused = adapted_layers(engine.module)[:1], offload.param_coordinator
    coordinators: dict[tuple[bool, bool], Any] = {}

    def select(*_: Any) -> None:
        kind = torch.is_grad_enabled(), any(layer.disable_adapters for layer in adapted)
        if kind not in coordinators:
            coordinators[kind] = _without_record(unused)
        offload.param_coordinator = coordinators[kind]

    # Before DeepSpeed's own hook, which starts a pass over the record.
    engine.module.register_forward_pre_hook(select, prepend=True)


def _without_record(coordinator: Any) -> Any:
    """A copy with a record of its own; the list of weights in flight stays shared."""
    own = copy.copy(coordinator)
    own._clear_trace_structures()
    return own
