"""Losses of the routers of a mixture of experts in one step, over the ranks; formulas: `objective.router`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.plan import Arrangement
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.objective.metrics import MetricSums
from dpo_dist.objective.router import BUSIEST, RouterLoss, selections


class RouterTerms:
    """Adds the losses of the routers to the micro-batches of one rank in one step.

    At first the selections of all micro-batches of this rank but the first are counted: from `known`, the
    `routing_sums` of all, if they are scored already, else by a forward of each. Collective.
    `unshared_tokens`: tokens of the global batch, a prompt once for each response.
    """

    def __init__(
        self,
        loss: RouterLoss,
        policy: PolicyEngine,
        batches: Sequence[PackedBatch],
        unshared_tokens: int,
        known: Sequence[Tensor],
        world: World,
    ):
        self._loss, self._world, self._tokens = loss, world, unshared_tokens
        self._selected: Tensor | None = None
        self._count = int(world.is_main)
        others = list(known[1:])
        for host_batch in batches[1:] if loss.aux is not None and not known else ():
            policy.train(False)
            batch = host_batch.to(world.device)
            if policy.model.arrangement is Arrangement.packed:
                # The output layer is used, as in every forward, and computes next to nothing.
                batch = batch.with_one_target()
            with torch.no_grad():
                others.append(policy.routed_token_logps(batch)[1])
        self._unseen = sum(map(selections, others), start=torch.zeros((), device=world.device))

    def add(self, loss: Tensor, routing: Tensor, sums: MetricSums) -> tuple[Tensor, MetricSums]:
        """Return the loss of a micro-batch with its part of the routers' losses, and `sums` with theirs.

        The first call of a step is collective. `loss` is divided by the pairs of the global batch.
        """
        if self._loss.aux is not None and self._selected is None:
            self._selected = self._world.sum_replicas(self._unseen + selections(routing))
        parts = self._loss.parts(routing, self._selected, self._tokens)
        values, count, self._count = dict(parts), self._count, 0
        if self._selected is not None:
            values[BUSIEST] = self._selected.max() / self._tokens * count
        return loss + self._loss.weighted(parts), sums.plus_values(values, count)
