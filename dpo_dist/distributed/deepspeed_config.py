"""DeepSpeed's configuration for the policy and for a model that is only scored; imports no DeepSpeed."""

import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from dpo_dist.config.schema import (
    ZERO_STAGES,
    Dtype,
    Offload,
    OptimConfig,
    OptimizerKind,
    ParallelismConfig,
    ParallelismKind,
)
from dpo_dist.distributed.processes.world import World
from dpo_dist.model.library_internals import sharded_by

START = 2.0**16  # the loss scale at the start of training in fp16
# Weights of a decoder layer over the square of the hidden size: 13 in Llama-3-70B, 19 in Qwen2.5-0.5B.
_SQUARES_PER_LAYER = 16
# DeepSpeed's default leaves are the expert blocks of Mixtral, Qwen2-MoE and Qwen3-MoE. Stacked experts, as
# transformers has them, are gathered alike by all ranks; and a leaf with an adapter fails if its input
# has no gradient.
_NO_LEAVES: dict[str, list[str]] = {"classes": []}
SUB_GROUP = 10**8
"""Weights that ZeRO-3 updates together with `adamw_bf16`; their gradients are copied for it."""


def policy_config(parallelism: ParallelismConfig, optim: OptimConfig, dtype: Dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration for the policy, without `communication`."""
    # On GPUs, ZeRO-2 and ZeRO-3 exchange gradients while backward computes.
    zero: dict[str, Any] = {
        "stage": ZERO_STAGES[parallelism.kind],
        "overlap_comm": torch.cuda.is_available(),
    }
    if parallelism.kind is ParallelismKind.zero3:
        zero["leaf_module"] = _NO_LEAVES
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if parallelism.offload_parameters is not Offload.none:
            zero["offload_param"] = _offload(parallelism.offload_parameters)
    if parallelism.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = _offload(parallelism.offload_optimizer)
    # Gradient sums over processes: in bf16 the error grows with their number, so float32 over several nodes.
    processes = os.environ.get("WORLD_SIZE", "1")
    summed = parallelism.shard_size or int(processes)  # several copies sum theirs in float32 anyway
    is_wide = summed > int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    config = _shared_config(zero, dtype)
    if optim.kind is OptimizerKind.adamw_bf16:
        zero["sub_group_size"] = SUB_GROUP
        # What the optimizer updates, and the gradients that it is given. Without the second flag DeepSpeed
        # demands CPU Adam.
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {
        **config,
        "gradient_accumulation_steps": 1,
        "communication_data_type": (Dtype.fp32 if is_wide else dtype).value,
        "gradient_clipping": optim.max_grad_norm or 0.0,  # 0: none is clipped
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": optim.dtype_of_sums.value},
    }


def communication(stage: int, hidden_size: int, *, trains: bool = True) -> dict[str, int]:
    """Return ZeRO's bucket sizes, in elements, for a model of this width.

    Stages 1 and 2 reduce about one decoder layer at a time, 2e8 elements for a 7B model, where DeepSpeed
    would allocate 5e8, as it does in stage 1 with bf16 whatever is configured. Stage 3 has the values of
    DeepSpeed's documentation and of transformers' `auto`: gradients are reduced, and weights prefetched, in
    buckets of about one square matrix; vectors are not sharded. A model that is only scored needs no memory
    for gradients and optimizer states: a whole layer is gathered while the one before it computes.
    DeepSpeed prefetches nothing while more than `stage3_max_live_parameters` are gathered: three layers fit,
    and never less than its default of 1e9.
    """
    square = hidden_size**2
    layer = _SQUARES_PER_LAYER * square
    if stage < 3:
        return {"reduce_bucket_size": layer, "allgather_bucket_size": layer}
    prefetch = {"reduce_bucket_size": square, "stage3_prefetch_bucket_size": int(0.9 * square)}
    if not trains:
        prefetch = {"stage3_prefetch_bucket_size": layer, "stage3_max_live_parameters": max(10**9, 3 * layer)}
    return {**prefetch, "stage3_param_persistence_threshold": 10 * hidden_size}


def frozen_config(offload: Offload, dtype: Dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a model that is only scored: sharded weights, no optimizer."""
    zero: dict[str, Any] = {"stage": 3, "leaf_module": _NO_LEAVES}
    if offload is not Offload.none:
        zero["offload_param"] = _offload(offload)
    return _shared_config(zero, dtype)


def _shared_config(zero: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype is Dtype.bf16},
        "fp16": {"enabled": dtype is Dtype.fp16, "loss_scale": START},  # `LossScale` changes it
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # they wait for the device in every step
    }


def _offload(target: Offload) -> dict[str, Any]:
    return {"device": target.value, "pin_memory": torch.cuda.is_available()}


def unsharded_loading(world: World) -> AbstractContextManager[None]:
    """Make transformers load unsharded weights inside the block, also if the policy is sharded."""
    return sharded_loading(world, {"zero_optimization": {"stage": 0}})


def sharded_loading(world: World, deepspeed_config: dict[str, Any]) -> AbstractContextManager[None]:
    """Inside the block, make transformers shard weights by this configuration, not by the policy's own."""
    return sharded_by(deepspeed_config, world.accelerator.state.deepspeed_plugin.dschf)
