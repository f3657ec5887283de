"""Several copies of the weights, each sharded by ZeRO-3 over its own group of ranks, such as those of a node.

Weights are gathered, and gradients reduced, inside of a group. Once a step, the ranks that have the same
shards of different copies sum their gradients, so that they make the same update.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dpo_dist.distributed.deepspeed_internals import (
    expert_gradient_sums,
    gradient_sums,
    shard_of,
    sharded_over,
)
from dpo_dist.distributed.processes.world import ShardGroup, World
from dpo_dist.model.experts import own_reader

_PART = 2**28  # gradients that are summed at a time


@contextlib.contextmanager
def shard_groups(world: World, size: int | None) -> Iterator[World]:
    """Yield `world` with groups of `size` consecutive ranks, over which ZeRO-3 shards what the block loads.

    None: one group of all ranks. Collective.
    """
    if size is None or size == world.size:
        yield world
        return
    timeout = timedelta(seconds=world.timeout_seconds)
    # Every rank creates every group, in the same order.
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=timeout)
        for first in range(0, world.size, size)
    ]
    copies = [dist.new_group(list(range(place, world.size, size)), timeout=timeout) for place in range(size)]
    number, place = divmod(world.rank, size)
    shards = ShardGroup(place, size, copies[place])
    with sharded_over(groups[number]):
        yield replace(world, shards=shards)


def copy_shards(weights: Iterable[Any], world: World) -> None:
    """Give all groups the shards of the first one: rank 0 alone has read the weights. Collective.

    Each rank reads its own experts, which have no values yet.
    """
    if world.shards is None:
        return
    for weight in weights:
        shard = shard_of(weight)
        if shard is not None and own_reader(weight) is None:
            values = shard.to(world.device)  # an offloaded one is on the host
            dist.broadcast(values, src=world.shards.rank, group=world.shards.copies)
            shard.copy_(values)


def sum_over_groups(engine: Any, world: World) -> None:
    """Make an engine's gradients, which are means over the ranks of a group, means over all; collective."""
    if world.shards is None:
        return
    share = world.shards.ranks / world.size
    for part in torch.split(gradient_sums(engine), _PART):
        of_part = part.float()  # in bf16 each addition would round
        dist.all_reduce(of_part, group=world.shards.copies)
        part.copy_(of_part.mul_(share))
    # Those of slices of experts DeepSpeed has divided by the number of all ranks.
    for of_experts in expert_gradient_sums(engine):
        of_experts.div_(share)
