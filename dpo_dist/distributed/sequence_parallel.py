"""Divide the ranks of a world into groups that share the tokens of every micro-batch (sequence parallelism).

ZeRO shards over the whole world as without such groups: each rank has the gradient of its own tokens, and
DeepSpeed's sum over all ranks is the gradient of all micro-batches.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_dist.distributed.world import World


def with_sequence_groups(world: World, ranks: int) -> World:
    """Return `world` in groups of `ranks` consecutive ranks, on one host where possible; collective."""
    if ranks == 1:
        return world
    timeout = timedelta(seconds=world.timeout_seconds)
    # Every rank creates every group, in the same order.
    groups = [
        dist.new_group(list(range(first, first + ranks)), timeout=timeout)
        for first in range(0, world.size, ranks)
    ]
    own = groups[world.rank // ranks]
    return replace(world, sequence=SequenceGroup(world.rank % ranks, ranks, own))


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share the tokens of a micro-batch; a `TokenExchange`."""

    rank: int
    ranks: int
    group: Any

    def all_to_all(self, parts: Tensor) -> Tensor:
        """See `TokenExchange`."""
        received: Tensor = _AllToAll.apply(parts, self)  # type: ignore[no-untyped-call]
        return received

    def all_gather(self, part: Tensor) -> Tensor:
        """See `TokenExchange`."""
        gathered: Tensor = _AllGather.apply(part, self)  # type: ignore[no-untyped-call]
        return gathered


class _AllToAll(torch.autograd.Function):
    """Its transpose is itself."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, ranks: SequenceGroup) -> Tensor:
        ctx.ranks = ranks
        return _exchanged(parts, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        return _exchanged(slopes.contiguous(), ctx.ranks), None


def _exchanged(parts: Tensor, ranks: SequenceGroup) -> Tensor:
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=ranks.group)
    return received


class _AllGather(torch.autograd.Function):
    """Every rank has the whole loss, so the gradient of an entry needs no sum over ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: SequenceGroup) -> Tensor:
        ctx.rank = ranks.rank
        gathered = part.new_empty(ranks.ranks * part.numel())
        dist.all_gather_into_tensor(gathered, part.flatten(), group=ranks.group)
        return gathered.view(ranks.ranks, *part.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[ctx.rank], None
