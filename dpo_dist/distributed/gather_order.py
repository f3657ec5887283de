"""ZeRO-3's recorded gather orders: one for each kind of forward of the policy."""

import copy
from typing import Any

import torch

from dpo_dist.model.adapters import active_adapters, adapted_layers

_Kind = tuple[bool, frozenset[str], bool, int]


def record_gather_orders(engine: Any, offload: Any) -> None:
    """Record one gather order per kind of forward, so that ZeRO-3 always prefetches the right weights.

    DeepSpeed records the order in which one forward and the backward after it use modules, and prefetches
    weights in that order. It keeps one record per model. A forward in another order discards the record, and
    recording again takes two forwards without prefetch and several collective comparisons. A policy has
    forwards of different orders: with gradients, without them, without its adapter, and in generation.

    A forward of one kind can add weights to those that a module gathers in every kind: a layer reads the
    weights of its active adapter, and DeepSpeed registers them as the layer's own. Orders recorded before
    are wrong then.

    Args:
        engine: of a `PackedCausalLM`, that shards its weights.
        offload: DeepSpeed's part of the engine that gathers weights.
    """
    unused = offload.param_coordinator
    coordinators: dict[_Kind, Any] = {}
    # Found once: a large model with an adapter has tens of thousands of modules.
    added = [
        module._external_params for module in engine.module.modules() if hasattr(module, "_external_params")
    ]
    layers = adapted_layers(engine.module)

    def select(generates: bool) -> None:
        kind = torch.is_grad_enabled(), active_adapters(layers), generates, sum(map(len, added))
        if kind not in coordinators:
            # The copy shares the list of weights in flight, and starts a new record.
            coordinators[kind] = copy.copy(unused)
            coordinators[kind]._clear_trace_structures()
        offload.param_coordinator = coordinators[kind]

    def before_packed_forward(*_: Any) -> None:
        select(generates=False)

    def before_generating_forward(*_: Any) -> None:
        if not engine.module.is_generating:  # a model of own logits is called as a whole
            return
        select(generates=True)
        # DeepSpeed's hook at the start of a forward is at the packed model, which does not generate.
        offload.param_coordinator.reset_step()

    # Before DeepSpeed's own hooks, which read the record.
    engine.module.register_forward_pre_hook(before_packed_forward, prepend=True)
    engine.module.causal_lm.register_forward_pre_hook(before_generating_forward, prepend=True)
