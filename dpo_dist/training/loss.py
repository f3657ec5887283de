"""Loss and metrics of one micro-batch, given a loss configuration and a reference provider."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.config.losses import LossConfig, Weighting
from dpo_dist.data.collate import RankBatch
from dpo_dist.distributed.zero import Engine, PolicyEngine
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
from dpo_dist.objective.router import RouterLoss
from dpo_dist.objective.token_logps import Statistic
from dpo_dist.reference.engine import ReferenceProvider

_BATCHES_AHEAD = 4


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
        model: Engine | None,
        batches: Iterable[PackedBatch],
        facts: BatchFacts,
        device: torch.device,
        enter: Callable[[Phase], None] = lambda _phase: None,
        *,
        is_evaluation: bool = False,
    ) -> Iterator[ScoredPairs]:
        """Yield each micro-batch, scored by the reference and then by `model`; collective.

        Without a model, by the reference only. `enter` is called with each phase of a step; an evaluation
        also has entropies.
        """
        for host_batch in batches:
            enter("data")
            batch = host_batch.to(device)
            enter("reference")
            reference = self.reference.token_logps(batch)
            enter("forward")
            yield self.score(model, batch, reference, facts, is_evaluation=is_evaluation)

    def score(
        self,
        policy: Engine | None,
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
        routing = None
        if policy is None:
            assert reference is not None
            values = reference
        elif self.router is None or is_evaluation:
            values = policy.token_logps(batch, wanted)
        else:
            assert isinstance(policy, PolicyEngine)
            values, routing = policy.routed_token_logps(batch, wanted)
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
