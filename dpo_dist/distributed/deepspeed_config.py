"""How much ZeRO communicates at a time, by the width of the model."""

from typing import Any


def communication_sizes(stage: int, hidden_size: int) -> dict[str, Any]:
    """How many elements DeepSpeed communicates at a time, by the model's width.

    Stage 3 as DeepSpeed's documentation and transformers' `auto` values have it: gradients are reduced, and
    weights fetched ahead, in pieces of about a square matrix, and vectors stay whole on every rank; 1e9
    weights may be live, which is DeepSpeed's default. The other stages reduce about one decoder layer at a
    time, 2e8 elements for a 7B model, where DeepSpeed would allocate 5e8 for the smallest one too.
    """
    square = hidden_size**2
    if stage < 3:
        return {"reduce_bucket_size": 16 * square, "allgather_bucket_size": 16 * square}
    return {
        "reduce_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def fetching_layers_ahead(deepspeed_config: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """`frozen_config` with what is gathered when, for a model of this width.

    The memory that training needs for gradients, optimizer states and activations is free while a model is
    scored, so a whole decoder layer, about 16 hidden sizes squared, is gathered while the one before it
    computes, and not one matrix as for the policy. DeepSpeed fetches nothing ahead while more than
    `stage3_max_live_parameters` are there: three layers, or its default of 1e9, which wide models exceed.
    Vectors stay whole on every rank; each would be a gather of its own.
    """
    layer = 16 * hidden_size**2
    zero = {
        **deepspeed_config["zero_optimization"],
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": max(10**9, 3 * layer),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    return {**deepspeed_config, "zero_optimization": zero}
