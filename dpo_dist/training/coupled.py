"""Pairs as a step has scored them, of one micro-batch or of the whole global batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_dist.data.collate import RankBatch
from dpo_dist.distributed.world import World
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import BatchFacts
from dpo_dist.objective.running_stats import RunningMeans

_COLUMNS = 9


@dataclass(frozen=True)
class ScoredPairs:
    """All that the loss and the metrics of some pairs are computed from.

    Attributes:
        policy: with a graph where gradients are on.
        reference: None where the loss needs none.
        score_gaps: float32 [pairs], or None without scores.
        pair_weights: float64 [pairs], of the loss; None where it has none.
        counts: float32 [pairs], 1, or 0 for a dummy.
    """

    policy: PairLogps
    reference: PairLogps | None
    score_gaps: Tensor | None
    pair_weights: Tensor | None
    counts: Tensor

    def columns(self) -> Tensor:
        """float64 [9, pairs]; zeros for what there is not."""
        nothing = torch.zeros_like(self.policy.chosen)
        whole_chosen, reference = self.policy.whole_chosen, self.reference
        columns = (
            self.policy.chosen,
            self.policy.rejected,
            self.policy.chosen_tokens,
            self.policy.rejected_tokens,
            nothing if whole_chosen is None else whole_chosen,
            nothing if reference is None else reference.chosen,
            nothing if reference is None else reference.rejected,
            nothing if self.score_gaps is None else self.score_gaps,
            nothing if self.pair_weights is None else self.pair_weights,
        )
        return torch.stack(columns)

    def from_columns(self, columns: Tensor) -> "ScoredPairs":
        """The pairs of these `columns`, which have what this has."""
        chosen, rejected, chosen_tokens, rejected_tokens, whole, of_chosen, of_rejected, gaps, weights = (
            columns
        )
        tokens, has_whole = (chosen_tokens, rejected_tokens), self.policy.whole_chosen is not None
        return ScoredPairs(
            policy=PairLogps(chosen, rejected, *tokens, whole_chosen=whole if has_whole else None),
            reference=None if self.reference is None else PairLogps(of_chosen, of_rejected, *tokens),
            score_gaps=gaps,
            pair_weights=None if self.pair_weights is None else weights,
            counts=torch.ones_like(chosen),
        )

    def facts(self, mean_chosen_tokens: float, running: RunningMeans) -> BatchFacts:
        """What the loss needs to know beside log-probs."""
        return BatchFacts(mean_chosen_tokens, self.score_gaps, self.pair_weights, running)


def gather_pairs(scored: Sequence[ScoredPairs], plan: RankBatch, world: World) -> ScoredPairs:
    """All pairs of the global batch in its order, alike on every rank; collective.

    Args:
        scored: this rank's micro-batches, without a graph.
    """
    whole = torch.zeros(_COLUMNS, plan.pairs, dtype=torch.float64, device=world.device)
    for pairs, places in zip(scored, plan.positions, strict=True):
        if places:
            whole[:, index_of(places, world.device)] = pairs.columns()
    return scored[0].from_columns(world.sum(whole))


def index_of(places: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [places] on `device`."""
    return torch.tensor(places).to(device, non_blocking=True)
