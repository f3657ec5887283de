"""The wall towards DeepSpeed and Accelerate: no other file uses their undocumented parts.

A version that changes one of these parts fails a test in tests/unit/distributed/test_deepspeed_internals.py,
which calls the functions below on real engines of one rank, or one of two ranks in tests/dist:
`test_checkpoint.py` (master weights, states of CPU Adam), `test_averages.py` (a reference that follows the
policy), `test_engine.py`, `test_generation.py` (orders of gathering).
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from accelerate.state import AcceleratorState
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import (
    InsertPostInitMethodToModuleSubClasses,
    ZeroParamStatus,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from dpo_dist.model.lora import active_adapters, adapted_layers

Range = tuple[nn.Parameter, int, int, int]
"""A part of a weight in a flat tensor: the weight, start in the tensor, start in the weight, length."""
Flat = tuple[Tensor, list[Range]]
"""A flat tensor of master weights, this rank's part of a group of weights, with their ranges."""


def is_sharded(weight: Any) -> bool:
    """Return whether ZeRO-3 shards a weight: outside of forwards the weight itself is empty."""
    return hasattr(weight, "ds_id")


def shard_of(weight: Any) -> Tensor | None:
    """Return this rank's slice of a weight, flat and with padding; None if the weight is not sharded."""
    shard: Tensor | None = getattr(weight, "ds_tensor", None)
    return shard


def whole_shape(weight: Any) -> tuple[int, ...]:
    """Return the shape of a weight, which ZeRO-3 may shard."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def whole_numel(weight: Any) -> int:
    """Return the number of elements of a weight, which ZeRO-3 may shard."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def zero_kind(engine: Any) -> str:
    """Return the name of the class that shards the optimizer of an engine."""
    return type(engine.optimizer).__name__


def inner_optimizer(engine: Any) -> Any:
    """Return the AdamW in the optimizer of an engine: it has the states and updates the master weights."""
    return engine.optimizer.optimizer


def optimizer_tensors(engine: Any) -> list[dict[str, Any]]:
    """Return the attributes of an engine's two optimizers: they refer to its tensors."""
    return [vars(engine.optimizer), vars(engine.optimizer.optimizer)]


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of the next updates."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def set_loss_scale(engine: Any, scale: float) -> None:
    """Set the number by which an engine in fp16 multiplies the next losses."""
    engine.optimizer.loss_scale = scale


def reduce_in_optimizer_only(engine: Any) -> None:
    """Keep a ZeRO-1 engine in bf16 with one process from reducing gradients to itself after backward.

    It would round them to bf16, which takes 5 % of a step. Optimizers of other stages reduce in backward.
    """
    if isinstance(engine.optimizer, BF16_Optimizer):
        engine.enable_backward_allreduce = False


def flat_masters(engine: Any, rank: int) -> list[Flat]:
    """Return the flat float32 tensors that the optimizer of an engine updates, of any ZeRO stage."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups = [_ranges_of_stage_3(weights, rank) for weights in optimizer.fp16_groups]
        tensors = optimizer.fp32_partitioned_groups_flat
    elif isinstance(optimizer, BF16_Optimizer):
        groups = [_ranges_of_mapping(weights) for weights in optimizer.bf16_groups]
        tensors = optimizer.fp32_groups_flat_partition
    else:
        groups = [_ranges_of_mapping(weights) for weights in optimizer.bit16_groups]
        tensors = optimizer.single_partition_of_fp32_groups
    return list(zip(tensors, groups, strict=True))


def shard_range(weight: Any, rank: int) -> tuple[int, int]:
    """Return first element and length of a rank's slice of a weight that ZeRO-3 shards."""
    size = weight.partition_numel()
    first = min(rank * size, weight.ds_numel)
    return first, min(size, weight.ds_numel - first)


def _ranges_of_mapping(weights: Sequence[Any]) -> list[Range]:
    """Stages 1 and 2 cut all weights together, laid end to end, into one slice for each rank."""
    ranges = []
    for weight in weights:
        if weight._hp_mapping is not None:  # None: no element of it is in this rank's slice
            master, part = weight._hp_mapping.hp_fragment_address, weight._hp_mapping.lp_fragment_address
            ranges.append((weight, master.start, part.start, part.numel))
    return ranges


def _ranges_of_stage_3(weights: Sequence[Any], rank: int) -> list[Range]:
    """Stage 3 cuts each weight into slices of equal length, of which the last ones may be padded."""
    ranges, start = [], 0
    for weight in weights:
        first, length = shard_range(weight, rank)
        if length:
            ranges.append((weight, start, first, length))
        start += weight.partition_numel()
    return ranges


def write_masters_to_model(engine: Any) -> None:
    """Set the weights of the forward to the master weights; collective."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def drop_gradients(engine: Any) -> None:
    """Forget the gradients of an update that was not applied.

    With ZeRO-2, bf16 and offload the next gradients would be added to them.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))


def restore_powers(adam: Any, step: int) -> None:
    """Give DeepSpeed's CPU Adam the powers of its betas that it has after `step` updates.

    It multiplies them in float32 with every update and has no other access to them. After any other number of
    updates than the next one it computes the power anew, which is rounded differently.
    """
    beta1, beta2 = adam.param_groups[0]["betas"]
    dummies = [torch.zeros(1) for _ in range(4)]
    for number in range(step + 1):  # 0 starts anew
        adam.ds_opt_adam.adam_update(adam.opt_id, number, 0.0, beta1, beta2, 1.0, 0.0, True, *dummies)


def _gathering(engine: Any) -> Any:
    """Return the part of an engine that gathers weights: it replaces the optimizer where there is none."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


def record_gather_orders(engine: Any) -> None:
    """Record one gather order per kind of forward, so that ZeRO-3 always prefetches the right weights.

    DeepSpeed records the order in which one forward and the backward after it use modules. A forward in
    another order discards the record, and recording again takes two forwards without prefetch and
    collective comparisons. A policy has forwards of different orders: with gradients, without them, without
    its adapter, and in generation. And a layer that reads the weights of its active adapter registers them
    as its own, so orders recorded before are wrong then.
    """
    offload = _gathering(engine)
    unused = offload.param_coordinator
    coordinators: dict[tuple[bool, frozenset[str], bool, int], Any] = {}
    # Collected once: a large model with an adapter has tens of thousands of modules.
    added = [
        module._external_params for module in engine.module.modules() if hasattr(module, "_external_params")
    ]
    layers = adapted_layers(engine.module)

    def select(module: nn.Module, _: Any) -> None:
        generates = module is not engine.module
        if generates and not engine.module.is_generating:  # a forward of its own logits, not a generation
            return
        kind = torch.is_grad_enabled(), active_adapters(layers), generates, sum(map(len, added))
        if kind not in coordinators:
            # The copy shares the list of weights in flight, and starts a new record.
            coordinators[kind] = copy.copy(unused)
            coordinators[kind]._clear_trace_structures()
        offload.param_coordinator = coordinators[kind]
        if generates:  # DeepSpeed's hook at the start of a forward is at the packed model, which does not
            offload.param_coordinator.reset_step()

    for module in (engine.module, engine.module.causal_lm):  # before DeepSpeed's hooks, which read the record
        module.register_forward_pre_hook(select, prepend=True)


@contextlib.contextmanager
def gathered_once(engine: Any) -> Iterator[None]:
    """Keep weights that ZeRO-3 gathers in the block until its end; it would release each after its use."""
    weights = [weight for weight in engine.module.parameters() if not weight.ds_persist]
    try:
        for weight in weights:
            weight.ds_persist = True
        yield
    finally:
        for weight in weights:
            weight.ds_persist = False
    # After an error weights may be in flight, which cannot be released: it would hide the error.
    _gathering(engine).param_coordinator.release_and_reset_all(engine.module)


def release_gathered(weights: Iterable[Any]) -> None:
    """Release small weights that ZeRO-3 keeps gathered between forwards: the next one gathers them."""
    for weight in weights:
        if weight.ds_status is ZeroParamStatus.AVAILABLE:
            weight.partition()


def forget_process_group() -> None:
    """Let DeepSpeed and Accelerate join other processes later: they keep the group that was destroyed."""
    deepspeed.comm.comm.cdb = None
    forget_accelerate_state()


def forget_accelerate_state() -> None:
    """Let Accelerate find its processes anew."""
    AcceleratorState._reset_state(reset_partial_state=True)


def use_gloo_all_reduce() -> None:
    """Keep DeepSpeed from compiling its own all-reduce for CPUs at first use; gloo needs no compiler."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def restore_linear() -> None:
    """Undo DeepSpeed's replacement of `torch.nn.functional.linear`, made whenever it loads sharded weights.

    The replacement adds biases after rounding the product: in bf16 it changes log-probs of unsharded models.
    """
    torch.nn.functional.linear = getattr(
        InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear
    )
