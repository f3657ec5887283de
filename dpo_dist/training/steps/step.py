"""One optimizer step, and one evaluation.

packed micro-batches of this rank (from disk to the host, by `Objective.ready_step`)
  -> reference log-probs     from the store, or one forward of the reference
  -> policy log-probs        one forward
  -> loss, metric sums       objective/losses.py, objective/metrics.py; routers' losses
  -> backward                adds gradients of the loss / the global batch's pairs
after the last micro-batch
  -> clip and update         skipped on all ranks if the gradient is not finite on any
  -> metrics                 one all-reduce of sums and counts
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.pack import PackedBatch, copy_to_device
from dpo_dist.batching.sampler import Indices
from dpo_dist.batching.step_batch import RankBatch
from dpo_dist.config.losses import LossConfig, LossKind, Weighting
from dpo_dist.config.metrics import AUC, MISMATCH
from dpo_dist.data import NUMBERS
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import Engine, PolicyEngine
from dpo_dist.foundation.background import prefetch
from dpo_dist.objective.logps import desensitised_weights, sum_by_response, wpo_weights
from dpo_dist.objective.losses import KINDS_WITH_FLOOR, BatchFacts, RunningMeans, log_ratios, loss_and_terms
from dpo_dist.objective.metrics import (
    CustomMetrics,
    MetricPlan,
    MetricSums,
    PairValues,
    ScoredPairs,
    label_rewards,
    metric_means,
    metric_sums,
    pair_values,
    wins,
)
from dpo_dist.objective.router import AUX_LOSS, BUSIEST, RouterLoss, selections
from dpo_dist.objective.token_logps import Statistic
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.reference.teacher import Teacher

_BATCHES_AHEAD = 4


@dataclass(frozen=True)
class ReadyStep:
    """One rank's share of a global batch, with its micro-batches on the host."""

    rank_batch: RankBatch
    batches: Sequence[PackedBatch]
    partners: Sequence[PackedBatch] = ()  # if the loss needs partners


@dataclass(frozen=True)
class Objective:
    """A run's loss, its reference, its metrics, and the losses that training adds for routers of experts."""

    loss: LossConfig
    reference: ReferenceProvider
    router: RouterLoss | None = None
    custom: CustomMetrics = field(default_factory=CustomMetrics)
    teacher: Teacher | None = None

    def ready_batches(self, rank_batch: RankBatch | None, device: torch.device) -> Iterator[PackedBatch]:
        """Yield this rank's micro-batches with stored reference log-probs; nothing if `rank_batch` is None.

        The micro-batches are on the host, in pinned memory if `device` is a GPU. Needs no model; thread-safe.
        """
        for batch in () if rank_batch is None else rank_batch.batches():
            ready = self.reference.add_stored_logps(batch)
            if self.loss.ld_alpha is not None:
                weights = desensitised_weights(batch.pair_tokens, self.loss.ld_alpha)
                ready = replace(ready, token_weights=weights)
            if self.teacher is not None:
                ready = self.teacher.ready(ready)
            yield ready.pinned() if device.type == "cuda" else ready

    def ready_step(self, rank_batch: RankBatch, device: torch.device) -> ReadyStep:
        """Return a training step with all its micro-batches and partners on the host."""
        partners = list(self.ready_batches(rank_batch.partners, device))
        return ReadyStep(rank_batch, list(self.ready_batches(rank_batch, device)), partners)

    def prefetch_batches(
        self, rank_batch: RankBatch | None, device: torch.device
    ) -> contextlib.AbstractContextManager[Iterator[PackedBatch]]:
        """Return the context of `ready_batches` that a background thread computes ahead."""
        return prefetch(self.ready_batches(rank_batch, device), _BATCHES_AHEAD)

    def score(
        self,
        model: Engine | None,
        batches: Iterable[PackedBatch],
        facts: BatchFacts,
        device: torch.device,
        *,
        is_evaluation: bool = False,
    ) -> Iterator[ScoredPairs]:
        """Yield the scores of each micro-batch by the reference and by `model`; collective.

        If `model` is None, the reference's log-probs also count as the policy's. An evaluation of a model
        also has entropies.
        """
        statistic_names: list[Statistic] = []
        if self.teacher is not None:
            statistic_names.append("of_teacher")
        if self.loss.weighting is Weighting.wpo:
            statistic_names.append("collisions")
        # Without a forward there is no entropy, and none of a score.
        if is_evaluation and model is not None and not self.loss.of_scores:
            statistic_names.append("entropy")
        if is_evaluation and self.teacher is not None:
            statistic_names.append("agreement")
        for host_batch in batches:
            batch = host_batch.to(device)
            # The reference first: its activations are gone before the policy's are kept for the backward.
            reference = self.reference.token_logps(batch)
            if self.teacher is not None:
                batch = self.teacher.answer(batch)
            routing = None
            if model is None:
                assert reference is not None
                values = reference
            elif self.router is None or is_evaluation:
                values = model.token_logps(batch, statistic_names)
            else:
                assert isinstance(model, PolicyEngine)
                values, routing = model.routed_token_logps(batch, statistic_names)
            token_logps, *rows = values.view(1 + len(statistic_names), len(batch.targets))
            statistics = dict(zip(statistic_names, rows, strict=True))
            sums = partial(
                sum_by_response,
                response_tokens=batch.response_tokens,
                ranking=batch.ranking,
                lengths=batch.lengths if self.loss.of_scores else None,
            )
            loss_sums = partial(sums, token_weights=batch.token_weights)
            pair_weights = None
            if "collisions" in statistics:
                pair_weights = wpo_weights(token_logps, statistics["collisions"], sums)
            numbers = {name: getattr(batch, name) for name in NUMBERS}
            divergence = agreement = None
            if batch.teacher is not None and "of_teacher" in statistics:
                divergence = sums(batch.teacher.divergences(statistics["of_teacher"])).chosen
                if "agreement" in statistics:
                    agreement = sums(statistics["agreement"])
            squared_ratio = None
            if LossKind.reverse_kl in self.loss.kinds:
                assert reference is not None
                squared_ratio = sums((token_logps - reference).square() / 2).chosen
            yield ScoredPairs(
                policy=loss_sums(token_logps),
                reference=None if reference is None else loss_sums(reference),
                weights=batch.weights,
                facts=replace(
                    facts,
                    score_gaps=batch.score_gaps,
                    pair_weights=pair_weights,
                    divergence=divergence,
                    squared_ratio=squared_ratio,
                    **numbers,
                ),
                distance=None if reference is None else sums((token_logps.detach() - reference).abs()),
                entropy=sums(statistics["entropy"]) if "entropy" in statistics else None,
                agreement=agreement,
                sources=batch.sources,
                routing=routing,
            )

    @torch.no_grad()
    def facts(
        self,
        model: Engine | None,
        rank_batch: RankBatch,
        partners: Iterable[PackedBatch],
        world: World,
        running: RunningMeans,
    ) -> BatchFacts:
        """Return facts of a global batch that losses need; collective if the loss needs `partners`."""
        facts = BatchFacts(rank_batch.mean_chosen_tokens, running=running)
        if rank_batch.partners is None:
            return facts
        # Partners are no training data, so they do not count for the routers.
        unrouted = replace(self, router=None)
        total = torch.zeros(1, dtype=torch.float64, device=world.device)
        for scored in unrouted.score(model, partners, facts, world.device):
            ratios = log_ratios(scored.policy, scored.reference, self.loss)
            total += (ratios.chosen * scored.weights).sum()
        return replace(facts, mismatch=world.sum_replicas(total)[0] / rank_batch.pairs)

    def plan(self, rank_batch: RankBatch, *, is_evaluation: bool = False) -> MetricPlan:
        """Return the plan of a global batch's metrics, the same on all ranks."""
        dataset = rank_batch.dataset
        has_floor = "soft_label" in dataset.numbers and not KINDS_WITH_FLOOR.isdisjoint(self.loss.kinds)
        return MetricPlan(self.loss, dataset.labels, is_evaluation, self.custom, has_floor)

    def measure(self, pairs: ScoredPairs, plan: MetricPlan) -> tuple[Tensor, MetricSums]:
        """Return the weighted sum of the losses, with a graph if gradients are enabled, and the metric sums.

        `pairs`: a micro-batch, for a coupled loss the whole global batch.
        """
        losses, terms = loss_and_terms(pairs.policy, pairs.reference, self.loss, pairs.facts)
        record_weights = pairs.facts.loss_weight
        weights = pairs.weights if record_weights is None else pairs.weights * record_weights
        return (losses * weights).sum(), metric_sums(plan, losses, pairs, terms)


class RouterTerms:
    """Adds the routers' losses to the micro-batches of one rank in one step.

    The losses need the experts' selections of the whole batch before the first backward. The constructor
    counts the selections of all micro-batches except the first: from `known`, the `routing_sums` of all
    micro-batches, or by a forward of each. `add` counts those of the first. Collective.

    `unshared_tokens`: tokens of the global batch, where a prompt counts once for each response.
    """

    def __init__(
        self,
        loss: RouterLoss,
        policy: PolicyEngine,
        batches: Sequence[PackedBatch],
        unshared_tokens: int,
        routed: Sequence[Tensor],
        world: World,
    ):
        self._loss = loss
        self._world = world
        self._tokens = unshared_tokens
        self._selected: Tensor | None = None
        self._count = int(world.is_main)
        others = list(routed[1:])
        for host_batch in () if routed else batches[1:]:
            policy.train(False)
            batch = host_batch.to(world.device)
            if policy.model.arrangement is Arrangement.packed:
                # One target is enough; without any, the forward would not gather the output layer's weight
                # (ZeRO-3).
                batch = batch.with_one_target()
            with torch.no_grad():
                others.append(policy.routed_token_logps(batch)[1])
        self._unseen = sum(map(selections, others), start=torch.zeros((), device=world.device))

    def add(self, loss: Tensor, routing: Tensor, sums: MetricSums) -> tuple[Tensor, MetricSums]:
        """Return a micro-batch's loss plus its part of the routers' losses, and `sums` with their metrics.

        The first call of a step is collective. `loss` is already divided by the global batch's pairs.
        """
        if self._selected is None:
            self._selected = self._world.sum_replicas(self._unseen + selections(routing))
        part = self._loss.part(routing, self._selected, self._tokens)
        count = self._count
        self._count = 0
        values = {AUX_LOSS: part, BUSIEST: self._selected.max() / self._tokens * count}
        return loss + self._loss.aux * part, sums.plus_values(values, count)


def train_step(
    policy: PolicyEngine,
    objective: Objective,
    step: ReadyStep,
    rate: float,
    world: World,
    running: RunningMeans,
) -> tuple[MetricSums, Tensor]:
    """Update the policy on one global batch; collective.

    A coupled loss needs the log-probs of the whole global batch: a first forward computes them without a
    graph; a second forward of each micro-batch backpropagates d loss / d log-prob.

    Returns this rank's metric sums, and the gradient norm before clipping: a scalar on the device, the same
    on all ranks, infinite if the update was skipped.
    """
    rank_batch = step.rank_batch
    device = world.device
    # Collective calls in one order on all ranks, whatever their pairs are (law L2): forwards of the partners
    # and their sum; for a coupled loss, forwards of all micro-batches and their gather; for routers, the
    # forwards and sum of selections; then forward and backward of each micro-batch, the update, the metrics.
    if objective.loss.needs_partners:
        policy.train(False)
    facts = objective.facts(policy, rank_batch, step.partners, world, running)
    plan = objective.plan(rank_batch)
    sums = MetricSums.zeros(plan, device)
    slopes = list[Tensor]()
    rewards = list[Tensor]()
    scored_before: list[ScoredPairs] = []
    # A coupled loss: log-probs of all ranks, then its derivative with respect to each of them.
    if objective.loss.is_coupled:
        policy.train(False)
        with torch.no_grad():
            scored_before = list(objective.score(policy, step.batches, facts, device))
        pairs = gather_pairs(scored_before, rank_batch, world)
        leaves = [leaf.requires_grad_() for leaf in _differentiable(pairs)]
        loss, batch_sums = objective.measure(pairs, plan)  # of the whole batch, on every rank
        loss = _nan_unless_finite(loss, pairs.policy.chosen) / rank_batch.pairs
        slopes += torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        if world.is_main:  # every rank has the whole batch's: they count once
            sums = batch_sums
        objective = replace(objective, reference=ReferenceProvider())  # the reference is already in `slopes`
    # Forward and backward, one micro-batch after the other: only one has its activations in memory.
    routers = None
    if objective.router is not None:
        routing = [pairs.routing for pairs in scored_before if pairs.routing is not None]
        routers = RouterTerms(
            objective.router, policy, step.batches, rank_batch.unshared_tokens, routing, world
        )
    policy.train()
    scored = objective.score(policy, step.batches, facts, device)
    for number, (pairs, positions) in enumerate(zip(scored, rank_batch.positions, strict=True), start=1):
        if objective.loss.is_coupled:
            # The chain rule: slope times log-prob has the gradient of the whole batch's loss. For a dummy, of
            # weight 0, any slope will do.
            places = on_device(positions or (0,), device)
            parts = zip(slopes, _differentiable(pairs), strict=True)
            loss = (torch.stack([slope[places] * part for slope, part in parts]) * pairs.weights).sum()
        else:
            loss, micro_sums = objective.measure(pairs, plan)
            logps = pairs.policy.chosen + pairs.policy.rejected
            loss = _nan_unless_finite(loss, logps) / rank_batch.weight
            sums = sums + micro_sums
        if routers is not None and pairs.routing is not None:
            loss, sums = routers.add(loss, pairs.routing, sums)
        if objective.loss.is_unpaired:
            rewards.append(label_rewards(pairs, objective.loss)[None])
        policy.backward(loss, is_last=number == len(step.batches))
    grad_norm = policy.step(rate)
    return _with_label_metrics(sums, rewards, rank_batch, facts, world), grad_norm


def _with_label_metrics(
    sums: MetricSums, rewards: Sequence[Tensor], rank_batch: RankBatch, facts: BatchFacts, world: World
) -> MetricSums:
    """Return `sums` with metrics that compare all labelled records of a global batch; collective.

    `rewards`: of each of this rank's micro-batches, [1, pairs]. Without labelled records, returns `sums`.
    """
    if rank_batch.is_good is None:
        return sums
    all_rewards = in_batch_order(rewards, rank_batch, world)[0]
    is_good = rank_batch.is_good
    if not world.is_main:
        return sums
    good = all_rewards[on_device(np.flatnonzero(is_good), all_rewards.device)]
    bad = all_rewards[on_device(np.flatnonzero(~is_good), all_rewards.device)]
    sums = sums.plus_values({AUC: wins(good, bad)}, len(good) * len(bad))
    if facts.mismatch is None:
        return sums
    return sums.plus_values({MISMATCH: facts.mismatch * rank_batch.pairs}, rank_batch.pairs)


def _nan_unless_finite(loss: Tensor, logps: Tensor) -> Tensor:
    """Return `loss` with a gradient of nan if the loss is not finite, so that no rank applies the update.

    Otherwise a pair with an infinite loss could have a gradient of 0, and the update would be applied.
    `logps`: log-probs that get the gradient.
    """
    return loss + torch.where(loss.detach().isfinite(), 0.0, torch.nan) * logps.sum()


def _differentiable(pairs: ScoredPairs) -> list[Tensor]:
    """Return the policy's values by which a coupled loss is differentiated, [pairs] each."""
    optional = (pairs.policy.whole_chosen, pairs.facts.divergence, pairs.facts.squared_ratio)
    return [pairs.policy.chosen, pairs.policy.rejected, *(each for each in optional if each is not None)]


@dataclass(frozen=True)
class StepTotals:
    """Metrics of one step's global batch, on the host, the same on all ranks.

    `votes`: for each vote, the number of ranks that cast this vote. `grad_norm`: before clipping.
    """

    sums: dict[str, float]
    counts: dict[str, float]
    means: dict[str, float]
    votes: list[int]
    grad_norm: float

    @property
    def is_bad(self) -> bool:
        """Whether the mean loss or the gradient norm is not finite."""
        return not (math.isfinite(self.means["loss"]) and math.isfinite(self.grad_norm))


def reduce_step(sums: MetricSums, votes: Sequence[bool], grad_norm: Tensor, world: World) -> StepTotals:
    """Return metrics and votes summed over all ranks: one all-reduce, one copy to the host; collective."""
    vote_values = copy_to_device(sums.values.device, np.array(votes, dtype=np.float64))
    # Ranks that share a sequence have the same sums: one of them counts.
    counted = sums.values if world.leads else torch.zeros_like(sums.values)
    total = world.sum(torch.cat((counted, vote_values)))
    *reduced, norm = torch.cat((total, grad_norm.double().view(1))).tolist()
    by_metric, counts = sums.by_name(reduced)
    ranks = list(map(round, reduced[len(sums.values) :]))
    return StepTotals(by_metric, counts, metric_means(by_metric, counts), ranks, norm)


_TIES = {"rewards/accuracies": 0.5, AUC: 0.5, "rewards/both_fall": 0.0}
"""The values of metrics that compare rewards, if all rewards are 0."""


def without_comparisons(totals: StepTotals) -> StepTotals:
    """Return the totals of a step of a policy that still is the reference: all pairs are ties.

    Its rewards differ from 0 by rounding alone, and which of two is larger is chance.
    """
    ties: dict[str, float] = {}
    for base, value in _TIES.items():
        ties |= {name: value for name in totals.sums if name.startswith(base)}
    sums = {
        name: ties[name] * totals.counts[name] if name in ties else total
        for name, total in totals.sums.items()
    }
    means = {name: ties.get(name, mean) for name, mean in totals.means.items()}
    return replace(totals, sums=sums, means=means)


@torch.no_grad()
def evaluate(
    model: Engine | None,
    objective: Objective,
    rank_batch: RankBatch,
    world: World,
    running: RunningMeans,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], PairValues]:
    """Return the metrics of a dataset, which is one global batch, and the values of every pair. Collective.

    `model` is in evaluation mode; if it is None, the reference's log-probs also count as the policy's.
    `check_stop` is called before each micro-batch and may raise; all ranks have the same number of them.
    """
    plan = objective.plan(rank_batch, is_evaluation=True)
    sums = MetricSums.zeros(plan, world.device)
    values = list[dict[str, Tensor]]()
    scored = list[ScoredPairs]()

    def watched(batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        for batch in batches:
            check_stop()
            yield batch

    with objective.prefetch_batches(rank_batch.partners, world.device) as batches:
        facts = objective.facts(model, rank_batch, watched(batches), world, running)
    with objective.prefetch_batches(rank_batch, world.device) as batches:
        for pairs in objective.score(model, watched(batches), facts, world.device, is_evaluation=True):
            values.append(pair_values(plan, pairs.policy, pairs.reference))
            if objective.loss.is_coupled:
                scored.append(pairs)
            else:
                sums += objective.measure(pairs, plan)[1]
    if objective.loss.is_coupled:
        _, batch_sums = objective.measure(gather_pairs(scored, rank_batch, world), plan)
        if world.is_main:
            sums = batch_sums
    parts = [torch.stack([*part.values()]) for part in values]
    table = in_batch_order(parts, rank_batch, world).float().cpu().numpy()
    rewards = [(part["reward_chosen"] + part["reward_rejected"])[None] for part in values]
    sums = _with_label_metrics(sums, rewards, rank_batch, facts, world)
    means = MetricSums(sums.names, world.sum_replicas(sums.values)).means()
    return means, PairValues.from_columns(dict(zip(values[0], table, strict=True)))


def gather_pairs(scored: Sequence[ScoredPairs], rank_batch: RankBatch, world: World) -> ScoredPairs:
    """Return all pairs of the global batch in its order, the same on every rank; collective.

    `scored`: this rank's micro-batches, without a graph; the loss uses no rankings.
    """
    parts = [replace(pairs, routing=None, sources=None) for pairs in scored]
    columns = [torch.stack([column.double() for column in _tensors(part)]) for part in parts]
    rows = iter(in_batch_order(columns, rank_batch, world))
    gathered: ScoredPairs = _with_tensors(parts[0], lambda _: next(rows))
    sources = None if rank_batch.sources is None else on_device(rank_batch.sources, world.device)
    return replace(gathered, sources=sources)


def in_batch_order(columns: Sequence[Tensor], rank_batch: RankBatch, world: World) -> Tensor:
    """Return values of all pairs in the global batch's order, float64 [columns, pairs]; collective.

    `columns`: values of each of this rank's micro-batches, [columns, pairs].
    """
    # A sum of one value and zeros is a gather for ranks with different numbers of pairs, and exact.
    values = torch.zeros(len(columns[0]), rank_batch.pairs, dtype=torch.float64, device=world.device)
    for part, positions in zip(columns, rank_batch.positions, strict=True):
        if positions:  # not a dummy
            values[:, on_device(positions, world.device)] = part.double()
    return world.sum_replicas(values)


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor changed, also tensors in the fields of dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    values = {field.name: _with_tensors(getattr(value, field.name), change) for field in fields(value)}
    return replace(value, **values)


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors of `value`, in the order in which `_with_tensors` changes them."""
    tensors: list[Tensor] = []
    _with_tensors(value, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return tensors


def on_device(numbers: Sequence[int] | Indices, device: torch.device) -> Tensor:
    """Return `numbers` as int64 [n] on `device`, without waiting for it."""
    return copy_to_device(device, np.asarray(numbers, dtype=np.int64))
