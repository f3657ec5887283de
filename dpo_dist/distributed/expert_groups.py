"""Expert parallelism under ZeRO-3: the ranks of a group share each layer's experts, and exchange tokens.

Each rank keeps whole experts, a slice of the stacked weights. Ranks with equal slices shard these by ZeRO-3
as any other weight, if they are trained; frozen ones stay whole, so that nothing of them is ever sent.
Weights keep their names, and slices in checkpoints their place in the whole weight. A quantized base is not
sharded: beside its experts, each rank has it whole.
"""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import nn

from dpo_dist.distributed.deepspeed_internals import is_sharded, keep_from_broadcast, shard_slice
from dpo_dist.distributed.processes.world import ExpertGroup, World
from dpo_dist.model.experts import (
    ExpertShare,
    exchange_tokens,
    expert_modules,
    keep_experts,
    own_reader,
    set_reader,
    shares_equally,
)
from dpo_dist.model.library_internals import describe_slice, whole_shape
from dpo_dist.model.packed import PackedCausalLM


def with_expert_groups(world: World, size: int) -> World:
    """Return `world` with groups of `size` consecutive ranks that share all experts; collective."""
    if size == 1:
        return world
    timeout = timedelta(seconds=world.timeout_seconds)
    shards = world.shard_place[1]

    def own_group(groups: list[list[int]]) -> Any:
        # Every rank creates every group, in the same order.
        made = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in groups]
        return next(group for ranks, group in made if world.rank in ranks)

    exchange = own_group([list(range(first, first + size)) for first in range(0, world.size, size)])
    # Equal experts are sharded inside of one copy of the weights.
    equal = own_group(
        [
            list(range(first + place, first + shards, size))
            for first in range(0, world.size, shards)
            for place in range(size)
        ]
    )
    alone = own_group([[rank] for rank in range(world.size)])
    return replace(world, experts=ExpertGroup(world.rank % size, size, exchange, equal, alone))


def share_experts(model: PackedCausalLM, world: World) -> None:
    """Keep only this rank's experts of each layer, and send tokens to the ranks of their experts; collective.

    Nothing changes without groups, or in a model whose experts they cannot share: see `check_shared_experts`.
    """
    group = world.experts
    if group is None or not shares_equally(model.causal_lm, group.ranks):
        return
    for module in expert_modules(model.causal_lm):
        own = ExpertShare(group.rank, group.ranks).of(whole_shape(next(module.parameters(recurse=False)))[0])
        packed = getattr(module, "packings", {})
        for name, weight in list(module.named_parameters(recurse=False)):
            piece: Any = weight
            if is_sharded(weight):
                read = own_reader(weight)
                if read is not None:
                    values = read().to(world.device, weight.dtype)
                    set_reader(weight, None)  # closes the files
                else:
                    with deepspeed.zero.GatheredParameters([weight]):
                        values = weight.data[own].clone()
                piece = nn.Parameter(values, weight.requires_grad)
                describe_slice(piece, whole_shape(weight), own.start)
                shard_slice(weight, piece, group)
            else:
                if name not in packed:  # only this rank's were packed
                    piece = nn.Parameter(weight.data[own].clone(), weight.requires_grad)
                keep_from_broadcast(piece)
            setattr(module, name, piece)
        keep_experts(module, own)
    exchange_tokens(model.causal_lm, group.exchange, group.alone)
    model.exchanges_tokens = True
