"""Losses of the routers of a mixture of experts in a training step.

The load-balancing loss needs the selections of experts of the whole global batch before the first backward.
All micro-batches of a rank but the first are therefore forwarded once more, without a graph and almost
without the output layer. A step of one micro-batch per rank costs one small all-reduce more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_dist.data.arrangement import Arrangement
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.objective.metrics import MetricSums
from dpo_dist.objective.router_losses import BUSIEST, RouterLoss, busiest_share, selections
from dpo_dist.training.batch_loss import ReadyStep, ScoredPairs


class RouterTerms:
    """Adds the losses of the routers to the micro-batches of one rank in one step.

    Args:
        loss: their coefficients.
        unseen: `selections` of all micro-batches of this rank but the first.
        step: this rank's share of the global batch.
        world: of all ranks.
    """

    def __init__(self, loss: RouterLoss, unseen: Tensor, step: ReadyStep, world: World):
        self._loss, self._unseen, self._world = loss, unseen, world
        self._tokens = step.rank_batch.rows_tokens
        self._selected: Tensor | None = None
        self._count = int(world.is_main)

    def add(self, loss: Tensor, routing: Tensor, sums: MetricSums) -> tuple[Tensor, MetricSums]:
        """Return the loss of a micro-batch with its part of the routers' losses, and `sums` with theirs.

        The first call of a step is collective.

        Args:
            loss: of the micro-batch, divided by the pairs of the global batch.
            routing: `objective.router_losses.routing_sums` of the micro-batch.
            sums: metric sums of this rank.
        """
        if self._loss.aux is not None and self._selected is None:
            self._selected = self._world.sum_replicas(self._unseen + selections(routing))
        parts = self._loss.parts(routing, self._selected, self._tokens)
        values, count, self._count = dict(parts), self._count, 0
        if self._selected is not None:
            values[BUSIEST] = busiest_share(self._selected, self._tokens) * count
        return loss + self._loss.weighted(parts), sums.plus_values(values, count)


def router_terms(
    policy: PolicyEngine, loss: RouterLoss | None, step: ReadyStep, world: World
) -> RouterTerms | None:
    """Return the losses of the routers for a step; None without such a loss. Collective."""
    if loss is None:
        return None
    unseen = torch.zeros((), device=world.device)
    policy.train(False)
    with torch.no_grad():
        for host_batch in step.batches[1:] if loss.aux is not None else ():
            batch = host_batch.to(world.device)
            if policy.model.arrangement is Arrangement.packed:
                # The output layer is used, as in every forward, and computes next to nothing.
                batch = batch.with_one_target()
            unseen = unseen + selections(policy.routed_token_logps(batch)[1])
    return RouterTerms(loss, unseen, step, world)


def coupled_router_terms(
    loss: RouterLoss | None, scored: Sequence[ScoredPairs], step: ReadyStep, world: World
) -> RouterTerms | None:
    """Return the losses of the routers for a step whose micro-batches are scored already; None without.

    Args:
        loss: their coefficients.
        scored: this rank's micro-batches.
        step: this rank's share of the global batch.
        world: of all ranks.
    """
    if loss is None:
        return None
    others = (selections(pairs.routing) for pairs in scored[1:] if pairs.routing is not None)
    return RouterTerms(loss, sum(others, start=torch.zeros((), device=world.device)), step, world)
