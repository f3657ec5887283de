"""Loss and metrics of one micro-batch, given a loss configuration and a reference provider."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.losses import LossConfig, Weighting
from dpo_dist.data.collate import RankBatch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.process import prefetch
from dpo_dist.insight.metrics.log import Phase
from dpo_dist.objective.logps import (
    PairLogps,
    desensitised_weights,
    sum_by_response,
    wpo_weights,
)
from dpo_dist.objective.losses import BatchFacts, preference_loss
from dpo_dist.objective.metrics import MetricPlan, MetricSums, divergence, metric_sums
from dpo_dist.objective.router import BUSIEST, RouterLoss, busiest_share, selections
from dpo_dist.objective.token_logps import Statistic
from dpo_dist.reference.scoring import ReferenceProvider

_BATCHES_AHEAD = 4


class ScoredModel(Protocol):
    """A model that scores micro-batches: the policy, or one that is only evaluated."""

    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        """Return log-probs of every target, float32 [targets]; with statistics [1 + n, targets]."""
        ...


@dataclass(frozen=True)
class ReadyStep:
    """One rank's share of a global batch, with its micro-batches on the host."""

    rank_batch: RankBatch
    batches: Sequence[PackedBatch]


@dataclass(frozen=True)
class ScoredPairs:
    """Policy and reference log-probs of a micro-batch, or of the global batch for coupled losses.

    `weights`, [pairs]: 1 for a pair, 0 for a dummy. `sources`, int64 [pairs]: index of each pair's source in
    `labels`. `kl` (`divergence`) and `entropy` (nats): of the policy's tokens, summed by response, if
    measured. `routing`: `objective.router.routing_sums`, if the loss has losses of routers.
    """

    policy: PairLogps
    reference: PairLogps | None
    facts: BatchFacts
    weights: Tensor
    kl: PairLogps | None = None
    entropy: PairLogps | None = None
    labels: tuple[str, ...] = ()
    sources: Tensor | None = None
    routing: Tensor | None = None
    is_evaluation: bool = False


@dataclass(frozen=True)
class Objective:
    """The loss of a run, its reference, and the losses that training adds for the routers of experts."""

    loss: LossConfig
    reference: ReferenceProvider
    router: RouterLoss | None = None

    def ready_batches(self, rank_batch: RankBatch, device: torch.device) -> Iterator[PackedBatch]:
        """Yield this rank's micro-batches, with stored reference log-probs attached.

        They stay on the host, in pinned memory if `device` is a GPU. Needs no model; thread-safe.
        """
        for batch in rank_batch.batches():
            ready = self.reference.attach(batch)
            if self.loss.ld_alpha is not None:
                weights = desensitised_weights(batch.pair_tokens, self.loss.ld_alpha)
                ready = replace(ready, token_weights=weights)
            yield ready.pinned() if device.type == "cuda" else ready

    def ready_step(self, rank_batch: RankBatch, device: torch.device) -> ReadyStep:
        """Return all `ready_batches` of a training step."""
        return ReadyStep(rank_batch, list(self.ready_batches(rank_batch, device)))

    def prefetched(
        self, rank_batch: RankBatch, device: torch.device
    ) -> contextlib.AbstractContextManager[Iterator[PackedBatch]]:
        """Return `ready_batches`, made ahead in a background thread."""
        return prefetch(self.ready_batches(rank_batch, device), _BATCHES_AHEAD)

    def scored(
        self,
        model: ScoredModel | None,
        batches: Iterable[PackedBatch],
        facts: BatchFacts,
        device: torch.device,
        enter: Callable[[Phase], None] = lambda _phase: None,
        *,
        is_evaluation: bool = False,
    ) -> Iterator[tuple[PackedBatch, ScoredPairs]]:
        """Yield each micro-batch on its device, scored by the reference and then by `model`; collective.

        Without a model, by the reference only. `enter` is called with each phase of a step; an evaluation
        also has entropies.
        """
        for host_batch in batches:
            enter("data")
            batch = host_batch.to(device)
            enter("reference")
            reference = self.reference.token_logps(batch)
            enter("forward")
            yield batch, self.score(model, batch, reference, facts, is_evaluation=is_evaluation)

    def score(
        self,
        policy: ScoredModel | None,
        batch: PackedBatch,
        reference: Tensor | None,
        facts: BatchFacts,
        *,
        is_evaluation: bool = False,
    ) -> ScoredPairs:
        """Return the policy's log-probs of a micro-batch beside the reference's; one forward, collective.

        `reference`: float32 [targets], of `reference.token_logps`. Other arguments as `scored`.
        """
        wanted: list[Statistic] = []
        if self.loss.weighting is Weighting.wpo:
            wanted.append("collisions")
        if is_evaluation and policy is not None:  # entropies need a forward
            wanted.append("entropy")
        if policy is None:
            assert reference is not None
            values, routing = reference, None
        else:
            values, routing = self.forward(policy, batch, wanted, is_evaluation=is_evaluation)
        token_logps, *rows = values.view(1 + len(wanted), len(batch.targets))
        statistics = dict(zip(wanted, rows, strict=True))
        sums = partial(sum_by_response, response_tokens=batch.response_tokens, ranking=batch.ranking)
        pair_weights = None
        if "collisions" in statistics:
            pair_weights = wpo_weights(token_logps, statistics["collisions"], sums)
        return ScoredPairs(
            policy=self.pair_logps(token_logps, batch),
            reference=None if reference is None else self.pair_logps(reference, batch),
            facts=replace(facts, score_gaps=batch.score_gaps, pair_weights=pair_weights),
            weights=batch.weights,
            kl=None if reference is None else sums(divergence(token_logps.detach(), reference)),
            entropy=sums(statistics["entropy"]) if "entropy" in statistics else None,
            labels=batch.labels,
            sources=batch.sources,
            routing=routing,
            is_evaluation=is_evaluation,
        )

    def forward(
        self,
        policy: ScoredModel,
        batch: PackedBatch,
        statistics: Sequence[Statistic] = (),
        *,
        is_evaluation: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the policy's `token_logps`, and in training what the losses of routers need; collective."""
        if self.router is None or is_evaluation:
            return policy.token_logps(batch, statistics), None
        assert isinstance(policy, PolicyEngine)
        return policy.routed_token_logps(batch, statistics)

    def pair_logps(self, token_logps: Tensor, batch: PackedBatch) -> PairLogps:
        """Sum the per-token log-probs of a micro-batch by response, as the loss weights tokens."""
        return sum_by_response(token_logps, batch.response_tokens, batch.ranking, batch.token_weights)

    def measure(self, pairs: ScoredPairs) -> tuple[Tensor, MetricSums]:
        """Return the sum of the losses, with a graph if gradients are enabled, and the metric sums.

        `pairs`: of a micro-batch; of the whole global batch for a coupled loss.
        """
        losses = preference_loss(pairs.policy, pairs.reference, self.loss, pairs.facts)
        plan = MetricPlan(self.loss, pairs.labels, pairs.is_evaluation)
        tokens = {"kl": pairs.kl, "entropy": pairs.entropy}
        sums = metric_sums(plan, losses, pairs.policy, pairs.reference, pairs.weights, tokens, pairs.sources)
        return (losses * pairs.weights).sum(), sums

    def no_sums(
        self, rank_batch: RankBatch, device: torch.device, *, is_evaluation: bool = False
    ) -> MetricSums:
        """Return metric sums of no pairs of a global batch."""
        plan = MetricPlan(self.loss, rank_batch.dataset.labels, is_evaluation)
        return MetricSums.zeros(plan.names, device)


class RouterTerms:
    """Adds the losses of the routers to the micro-batches of one rank in one step.

    `unseen`: `selections` of all micro-batches of this rank but the first.
    """

    def __init__(self, loss: RouterLoss, unseen: Tensor, step: ReadyStep, world: World):
        self._loss, self._unseen, self._world = loss, unseen, world
        self._tokens = step.rank_batch.rows_tokens
        self._selected: Tensor | None = None
        self._count = int(world.is_main)

    @classmethod
    def of(
        cls, policy: PolicyEngine, loss: RouterLoss | None, step: ReadyStep, world: World
    ) -> "RouterTerms | None":
        """Count the selections of a step, one forward for each micro-batch but the first; collective.

        None without losses of routers.
        """
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
        return cls(loss, unseen, step, world)

    @classmethod
    def of_scored(
        cls, loss: RouterLoss | None, scored: Sequence[ScoredPairs], step: ReadyStep, world: World
    ) -> "RouterTerms | None":
        """Count the selections of a step whose micro-batches are scored already; None without losses."""
        if loss is None:
            return None
        others = (selections(pairs.routing) for pairs in scored[1:] if pairs.routing is not None)
        return cls(loss, sum(others, start=torch.zeros((), device=world.device)), step, world)

    def add(self, loss: Tensor, routing: Tensor, sums: MetricSums) -> tuple[Tensor, MetricSums]:
        """Return the loss of a micro-batch with its part of the routers' losses, and `sums` with theirs.

        The first call of a step is collective. `loss` is divided by the pairs of the global batch.
        """
        if self._loss.aux is not None and self._selected is None:
            self._selected = self._world.sum_replicas(self._unseen + selections(routing))
        parts = self._loss.parts(routing, self._selected, self._tokens)
        values, count, self._count = dict(parts), self._count, 0
        if self._selected is not None:
            values[BUSIEST] = busiest_share(self._selected, self._tokens) * count
        return loss + self._loss.weighted(parts), sums.plus_values(values, count)
