"""From a global batch to what one rank computes: the plan of a step and its packed micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dpo_dist.data.dataset import PairDataset
from dpo_dist.data.micro_batches import ComputeCosts, plan_micro_batches
from dpo_dist.data.packing import PackedBatch, dummy_batch, pack
from dpo_dist.data.sampler import Indices


@dataclass(frozen=True)
class StepPlan:
    """One global batch as one rank sees it; every rank has the same number of micro-batches.

    Attributes:
        micro_batches: rows of this rank's micro-batches; empty ones become dummies.
        places: where these rows stand in the global batch.
        pairs: pairs of the global batch, over all ranks.
        tokens: packed tokens of the global batch, over all ranks.
        targets: completion tokens of the global batch.
        attended: pairs of a packed token of the global batch with one it attends to.
        mean_chosen_tokens: mean completion tokens of the chosen responses of the global batch.
        only_chosen: whether the other responses are left out.
    """

    dataset: PairDataset
    micro_batches: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, ...], ...]
    pairs: int
    tokens: int
    targets: int
    attended: int
    mean_chosen_tokens: float
    only_chosen: bool = False

    def batches(self) -> Iterator[PackedBatch]:
        """This rank's micro-batches in order, on the host."""
        for rows in self.micro_batches:
            yield pack_rows(self.dataset, rows, self.only_chosen)


def plan_step(
    dataset: PairDataset,
    rows: Indices,
    rank: int,
    world_size: int,
    micro_batch_tokens: int,
    costs: ComputeCosts,
    only_chosen: bool = False,
) -> StepPlan:
    """Divide the global batch `rows` among ranks and micro-batches, evenly by `costs`; O(batch)."""
    counts = dataset.response_counts(rows)
    places = dataset.response_places(rows)
    if only_chosen:
        places, counts = places[np.cumsum(counts) - counts], np.ones_like(counts)
    sizes = dataset.sizes(rows, places, counts, costs)
    mine = [tuple(ranks[rank]) for ranks in plan_micro_batches(sizes, world_size, micro_batch_tokens)]
    return StepPlan(
        dataset=dataset,
        micro_batches=tuple(tuple(int(rows[place]) for place in micro_batch) for micro_batch in mine),
        places=tuple(mine),
        pairs=len(rows),
        tokens=int(sizes.tokens.sum()),
        targets=int(sizes.targets.sum()),
        attended=int(sizes.attended.sum()),
        mean_chosen_tokens=dataset.mean_chosen_tokens(rows),
        only_chosen=only_chosen,
    )


def pack_rows(dataset: PairDataset, rows: Sequence[int], only_chosen: bool = False) -> PackedBatch:
    """Pairs as one micro-batch, whole or their chosen responses only; a dummy if there are none."""
    if not rows:
        return dummy_batch()
    which = [0] if only_chosen else None
    places = [dataset.response_rows(row) for row in rows]
    keys = dataset.keys[np.concatenate([place[:1] if only_chosen else place for place in places])]
    packed = pack([dataset.sequences(row, which) for row in rows], keys)
    return replace(packed, score_gaps=torch.from_numpy(dataset.score_gaps(rows)))
