"""DeepSpeed's configuration: built here and nowhere else.

Every kind of parallelism is a ZeRO stage, so that one code path gives gradient norms, skipped steps, sharded
checkpoints and bf16 with float32 master weights: `zero3` shards everything, `zero2` shards gradients and
optimizer states, `ddp` shards optimizer states only.
"""

from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.optim_schema import OptimConfig
from dpo_dist.config.schema import ZERO_STAGES, Dtype, Offload, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.loss_scale import START

# Weights of a decoder layer over the square of the hidden size: 13 in Llama-3-70B, 19 in Qwen2.5-0.5B.
_SQUARES_PER_LAYER = 16
# DeepSpeed's default leaves are the expert blocks of Mixtral, Qwen2-MoE and Qwen3-MoE, which need it where
# experts are a list of modules; `distributed.leaves` finds these. Stacked experts, as transformers has them
# now, are gathered alike by all ranks; and a leaf with an adapter and an input without a gradient fails.
_NO_LEAVES: dict[str, list[str]] = {"classes": []}


def policy_config(parallelism: ParallelismConfig, optim: OptimConfig, dtype: Dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration of the policy, without `policy_communication`."""
    zero: dict[str, Any] = {"stage": ZERO_STAGES[parallelism.kind], "overlap_comm": torch.cuda.is_available()}
    if parallelism.kind is ParallelismKind.zero3:
        zero["leaf_module"] = _NO_LEAVES
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if parallelism.offload_parameters is not Offload.none:
            zero["offload_param"] = _offload(parallelism.offload_parameters)
    if parallelism.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = _offload(parallelism.offload_optimizer)
    return {
        **_shared_config(zero, dtype),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def policy_communication(stage: int, hidden_size: int) -> dict[str, Any]:
    """Return the bucket sizes of the policy's ZeRO configuration, in elements, for a model of this width.

    Stage 3 has the values of DeepSpeed's documentation and of transformers' `auto`: gradients are reduced,
    and weights prefetched, in buckets of about one square matrix; vectors are not sharded; 1e9 weights may
    be live, which is DeepSpeed's default. The other stages reduce about one decoder layer at a time, 2e8
    elements for a 7B model, where DeepSpeed would allocate 5e8 for a model of any size.
    """
    square = hidden_size**2
    if stage < 3:
        layer = _SQUARES_PER_LAYER * square
        return {"reduce_bucket_size": layer, "allgather_bucket_size": layer}
    return {
        "reduce_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def frozen_config(offload: Offload, dtype: Dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a model that is only scored: sharded weights, no optimizer."""
    zero: dict[str, Any] = {"stage": 3, "leaf_module": _NO_LEAVES}
    if offload is not Offload.none:
        zero["offload_param"] = _offload(offload)
    return _shared_config(zero, dtype)


def with_nvme(frozen: dict[str, Any], folder: Path, largest_shard: int) -> dict[str, Any]:
    """Return `frozen_config` with its weights in `folder`, read when they are needed.

    DeepSpeed reads shards into a few buffers in host memory, and fails where a shard is larger than a buffer.

    Args:
        frozen: from `frozen_config`, with offload.
        folder: used by this process alone.
        largest_shard: elements of the largest weight that one process has.
    """
    offload = frozen["zero_optimization"]["offload_param"]
    return _with_zero(
        frozen, {"offload_param": {**offload, "nvme_path": str(folder), "buffer_size": largest_shard}}
    )


def with_layer_prefetch(frozen: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return `frozen_config` with prefetch of a whole decoder layer, for a model of this width.

    The memory that training needs for gradients, optimizer states and activations is free while a model is
    scored, so a layer is gathered while the one before it computes. DeepSpeed prefetches nothing while more
    than `stage3_max_live_parameters` are gathered: three layers fit, and never less than its default of 1e9.
    Vectors are not sharded: each would be a gather of its own.
    """
    layer = _SQUARES_PER_LAYER * hidden_size**2
    return _with_zero(
        frozen,
        {
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": max(10**9, 3 * layer),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        },
    )


def _with_zero(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return {**config, "zero_optimization": {**config["zero_optimization"], **options}}


def _shared_config(zero: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype is Dtype.bf16},
        "fp16": {"enabled": dtype is Dtype.fp16, "loss_scale": START},  # `LossScale` changes it
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every forward and step
    }


def _offload(target: Offload) -> dict[str, Any]:
    return {"device": target.value, "pin_memory": torch.cuda.is_available()}
