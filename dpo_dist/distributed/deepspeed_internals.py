"""Undocumented parts of DeepSpeed and Accelerate; no other file uses them.

If a new version changes one of these parts, a test fails: tests/unit/distributed/test_deepspeed_internals.py
calls the functions below on real engines with one rank, and these files of tests/dist with two ranks:
`test_checkpoint.py` (master weights, states of CPU Adam), `test_averages.py` (a reference that follows the
policy), `test_engine.py`, `test_generation.py` (orders of gathering), `test_families.py` (gradients of
leaves; tests/unit/distributed/test_zero.py has those that would be lost).
"""

import contextlib
import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState, SharedDict
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import (
    Init,
    InsertPostInitMethodToModuleSubClasses,
    ZeroParamStatus,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers.integrations import deepspeed as transformers_deepspeed

from dpo_dist.distributed.processes.world import ExpertGroup
from dpo_dist.model.library_internals import first_element
from dpo_dist.model.lora import active_adapters, adapted_layers

Range = tuple[nn.Parameter, int, int, int]
"""A part of a weight in a flat tensor: the weight, start in the tensor, start in the weight, length."""
Flat = tuple[Tensor, list[Range]]
"""A flat tensor with this rank's part of a group of trained weights, and the weights' ranges in it."""


OWN_ATTRIBUTES = ("ds_", "applied_pre_backward_")
"""How names begin that ZeRO-3 sets on layers, some of which count calls."""


def is_sharded(weight: Any) -> bool:
    """Return whether ZeRO-3 shards a weight, which is then empty outside of forwards."""
    return hasattr(weight, "ds_id")


def shard_of(weight: Any) -> Tensor | None:
    """Return this rank's slice of a weight, flat and with padding; None if the weight is not sharded."""
    shard: Tensor | None = getattr(weight, "ds_tensor", None)
    return shard


def whole_numel(weight: Any) -> int:
    """Return the number of elements of a whole weight, sharded by ZeRO-3 or not."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def inner_optimizer(engine: Any) -> Any:
    """Return the AdamW in an engine's ZeRO optimizer, which has the states and updates the master weights."""
    return engine.optimizer.optimizer


def optimizer_tensors(engine: Any) -> list[dict[str, Any]]:
    """Return the attributes of an engine's two optimizers, which refer to the engine's tensors."""
    return [vars(engine.optimizer), vars(engine.optimizer.optimizer)]


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of the next updates."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def set_loss_scale(engine: Any, scale: float) -> None:
    """Set the number by which an engine in fp16 multiplies the next losses."""
    engine.optimizer.loss_scale = scale


def reduce_in_optimizer_only(engine: Any) -> None:
    """Stop a bf16 ZeRO-1 engine of one process from reducing gradients with itself after backward.

    Rounding them to bf16 would take 5 % of a step. Optimizers of other stages reduce during backward.
    """
    if isinstance(engine.optimizer, BF16_Optimizer):
        engine.enable_backward_allreduce = False


def flat_masters(engine: Any) -> list[Flat]:
    """Return the flat tensors that the optimizer of an engine updates, of any ZeRO stage."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups = [_ranges_of_stage_3(weights) for weights in optimizer.fp16_groups]
        tensors = optimizer.fp32_partitioned_groups_flat
    elif isinstance(optimizer, BF16_Optimizer):
        groups = [_ranges_of_mapping(weights) for weights in optimizer.bf16_groups]
        tensors = optimizer.fp32_groups_flat_partition
    else:
        groups = [_ranges_of_mapping(weights) for weights in optimizer.bit16_groups]
        tensors = optimizer.single_partition_of_fp32_groups
    return list(zip(tensors, groups, strict=True))


def join_masters(engine: Any) -> None:
    """Let the optimizer of an engine update the model's own weights, both in bf16, and release its copies.

    DeepSpeed keeps copies as master weights. ZeRO-3 means to keep none of a weight's own dtype, but compares
    a device with its name, which is never equal.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        masters = optimizer.fp32_partitioned_groups_flat
        for master, part in zip(masters, optimizer.fp16_partitioned_groups_flat, strict=True):
            master.data = part.data
        return
    for number, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = dist.get_rank(optimizer.real_dp_process_group[number])
        master.data = optimizer.parallel_partitioned_bit16_groups[number][rank].data
        for weight in optimizer.bit16_groups[number]:
            mapping = weight._hp_mapping
            if mapping is not None:  # its view of the copy would keep the copy
                part = mapping.hp_fragment_address
                mapping.hp_fragment = master.detach().narrow(0, part.start, part.numel)


def shard_range(weight: Any) -> tuple[int, int]:
    """Return the first element and the length of this rank's shard of a weight, or of a slice of one."""
    size = weight.partition_numel()
    first = min(weight.ds_zero_partition_rank * size, weight.ds_numel)
    return first_element(weight) + first, min(size, weight.ds_numel - first)


@contextlib.contextmanager
def sharded_over(group: Any) -> Iterator[None]:
    """Inside the block, ZeRO-3 shards weights over the ranks of `group`; None: over all ranks.

    DeepSpeed and transformers give no group where they shard weights.
    """
    original = Init.__init__

    @functools.wraps(original)
    def shard(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, "data_parallel_group": group})

    if group is not None:
        Init.__init__ = shard
    try:
        yield
    finally:
        Init.__init__ = original


def shard_slice(weight: Any, piece: Any, group: ExpertGroup) -> None:
    """Shard `piece`, a slice of the sharded `weight` for this rank's experts, and release the weight.

    Trained, it is sharded over the ranks with equal experts, and DeepSpeed counts its gradients as those of
    an expert: each rank of the group has others, of the tokens of all ranks. Frozen, it stays whole.
    """
    piece.ds_zero_partition_process_group = group.alone
    if piece.requires_grad:
        name = f"experts over {group.ranks}"
        groups._EXPERT_PARALLEL_GROUP[name] = group.exchange
        piece.ds_zero_placement_family = "autoep_expert"
        piece.ds_zero_partition_group_name = name
        piece.ds_zero_partition_process_group = group.equal
    weight.convert_to_zero_parameters([piece])
    weight.ds_tensor = None


def keep_from_broadcast(weight: Any) -> None:
    """Let a weight keep this rank's values where DeepSpeed gives all ranks those of rank 0."""
    weight.ds_optim_param = True


def gradient_sums(engine: Any) -> Tensor:
    """Return this rank's shards of the gradients of a ZeRO-3 engine since its last update, flat."""
    sums: Tensor = engine.optimizer.grad_partitions_flat_buffer
    return sums


def expert_gradient_sums(engine: Any) -> list[Tensor]:
    """Return the parts of `gradient_sums` that are of slices of experts."""
    optimizer = engine.optimizer
    parts = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    weights = itertools.chain(*optimizer.fp16_groups)
    return [parts[weight.ds_id] for weight in weights if hasattr(weight, "ds_zero_placement_family")]


def _ranges_of_mapping(weights: Sequence[Any]) -> list[Range]:
    """Return the ranges in stages 1 and 2, which concatenate all weights and cut one slice per rank."""
    ranges = []
    for weight in weights:
        if weight._hp_mapping is not None:  # None: no element of it is in this rank's slice
            master = weight._hp_mapping.hp_fragment_address
            part = weight._hp_mapping.lp_fragment_address
            ranges.append((weight, master.start, part.start, part.numel))
    return ranges


def _ranges_of_stage_3(weights: Sequence[Any]) -> list[Range]:
    """Return the ranges in stage 3, which cuts each weight into equal slices; the last may be padded."""
    ranges = []
    start = 0
    for weight in weights:
        first, length = shard_range(weight)
        if length:
            ranges.append((weight, start, first, length))
        start += weight.partition_numel()
    return ranges


def write_masters_to_model(engine: Any) -> None:
    """Copy the master weights to the weights of the forward; collective."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def drop_gradients(engine: Any) -> None:
    """Drop the gradients of an update that was not applied.

    With ZeRO-2, bf16 and offload, the next gradients would be added to these.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))


def restore_powers(adam: Any, step: int) -> None:
    """Set the powers of beta in DeepSpeed's CPU Adam to their values after `step` updates.

    CPU Adam multiplies the powers in float32 with every update, and gives no access to them. If it skips an
    update number, it computes the power directly, with another rounding.
    """
    beta1, beta2 = adam.param_groups[0]["betas"]
    dummies = [torch.zeros(1) for _ in range(4)]
    for number in range(step + 1):  # 0 starts anew
        adam.ds_opt_adam.adam_update(adam.opt_id, number, 0.0, beta1, beta2, 1.0, 0.0, True, *dummies)


def _gathering(engine: Any) -> Any:
    """Return the part of an engine that gathers weights; a model that is only scored has it as optimizer."""
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
        if generates and not engine.module.is_generating:  # the packed model called it: no generation
            return
        kind = torch.is_grad_enabled(), active_adapters(layers), generates, sum(map(len, added))
        if kind not in coordinators:
            # The copy shares the list of weights in flight, and starts a new record.
            coordinators[kind] = copy.copy(unused)
            coordinators[kind]._clear_trace_structures()
        offload.param_coordinator = coordinators[kind]
        if generates:  # DeepSpeed does so in a hook of the packed model, which is not called
            offload.param_coordinator.reset_step()

    for module in (engine.module, engine.module.causal_lm):  # before DeepSpeed's hooks, which read the record
        module.register_forward_pre_hook(select, prepend=True)


class LeafGradients:
    """Makes ZeRO-3 reduce the gradients of a leaf once per backward, and names those that it would lose.

    DeepSpeed reduces the gradients of a leaf whenever the backward of the leaf ends, and zeros where there is
    no gradient yet: a weight has one only after all of its uses. What comes later stays in `grad`, and
    `zero_grad` throws it away; on a CPU that raises an error of torch. So a leaf that one forward calls
    several times (a forward per response, or a model that repeats its layers) waits for its last use.
    """

    def __init__(self, engine: Any):
        self._engine = engine
        self._uses: Counter[nn.Module] = Counter()  # in this forward, less those that backward ended
        self._late: set[nn.Parameter] = set()
        engine.module.register_forward_pre_hook(lambda *_: self._uses.clear())
        optimizer = engine.optimizer
        leaves = zip(optimizer.leaf_parameters.items(), optimizer._leaf_module_hooks, strict=True)
        for (leaf, weights), handle in leaves:
            leaf.register_forward_pre_hook(self._count_use)
            leaf._backward_hooks[handle.id] = partial(self._after_use, leaf._backward_hooks[handle.id])
            for weight in weights:
                weight.register_post_accumulate_grad_hook(partial(self._note_late, leaf))

    def _count_use(self, leaf: nn.Module, _: Any) -> None:
        # Gradient checkpointing computes a layer again in backward: no further use.
        if torch.is_grad_enabled() and not self._engine._running_engine_backward:
            self._uses[leaf] += 1

    def _after_use(self, reduce: Callable[..., None], leaf: nn.Module, *gradients: Any) -> None:
        self._uses[leaf] -= 1
        if not self._uses[leaf]:
            reduce(leaf, *gradients)

    def _note_late(self, leaf: nn.Module, weight: nn.Parameter) -> None:
        # DeepSpeed may not have sent the zeros yet, and send the gradient with them: by chance, on a GPU.
        if not self._uses[leaf]:
            self._late.add(weight)

    def drop_lost(self) -> set[nn.Parameter]:
        """Drop the gradients that ZeRO-3 did not reduce, or too early, and return their weights."""
        weights = [*itertools.chain(*self._engine.optimizer.fp16_groups)]
        lost = {weight for weight in weights if weight.grad is not None} | self._late
        for weight in lost:
            weight.grad = None
        self._late.clear()
        return lost


@contextlib.contextmanager
def gathered_once(engine: Any) -> Iterator[None]:
    """Keep weights that ZeRO-3 gathers inside the block until its end, not only until their use."""
    weights = [weight for weight in engine.module.parameters() if not weight.ds_persist]
    try:
        for weight in weights:
            weight.ds_persist = True
        yield
    finally:
        for weight in weights:
            weight.ds_persist = False
    # Not after an error: releasing weights in flight would raise another error and hide the first.
    _gathering(engine).param_coordinator.release_and_reset_all(engine.module)


def release_gathered(weights: Iterable[Any]) -> None:
    """Release small weights that ZeRO-3 keeps gathered, so that the next forward gathers them again."""
    for weight in weights:
        if weight.ds_status is ZeroParamStatus.AVAILABLE:
            weight.partition()


def forget_process_group() -> None:
    """Make DeepSpeed look for a process group anew: it keeps a destroyed one."""
    deepspeed.comm.comm.cdb = None
    groups._release_process_group_references()


@contextlib.contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Inside the block Accelerate has a new state; afterwards the caller's again, with its Accelerators.

    So has transformers, whose DeepSpeed configuration shards what is loaded.
    """
    kinds = (PartialState, AcceleratorState, GradientState)
    states = [vars(kind)["_shared_state"] for kind in kinds]
    reference = transformers_deepspeed._hf_deepspeed_config_weak_ref
    for kind in kinds:
        kind._shared_state = SharedDict()
    try:
        yield
    finally:
        for kind, state in zip(kinds, states, strict=True):
            kind._shared_state = state
        transformers_deepspeed._hf_deepspeed_config_weak_ref = reference


def timeout_of(group: Any) -> timedelta:
    """Return how long a collective call of a process group waits."""
    timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return timeout


def use_gloo_all_reduce() -> None:
    """Make DeepSpeed all-reduce on CPUs by gloo; its own kernel would need a compiler at first use."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def restore_linear() -> None:
    """Restore `torch.nn.functional.linear`, which DeepSpeed replaces whenever it loads sharded weights.

    The replacement rounds the product before it adds the bias: in bf16 it changes unsharded models'
    log-probs.
    """
    torch.nn.functional.linear = getattr(
        InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear
    )
