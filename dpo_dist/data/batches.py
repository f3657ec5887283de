"""From a global batch to what one rank computes: the plan of a step and its packed micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_dist.data.dataset import PairDataset
from dpo_dist.data.pack import PackedBatch, dummy_batch, pack
from dpo_dist.data.plan import ComputeCosts, plan_micro_batches
from dpo_dist.data.schedule import Rows


@dataclass(frozen=True)
class StepPlan:
    """One global batch as one rank sees it; every rank has the same number of micro-batches.

    Attributes:
        micro_batches: rows of this rank's micro-batches; empty ones become dummies.
        pairs: pairs of the global batch, over all ranks.
        tokens: packed tokens of the global batch, over all ranks.
        targets: completion tokens of the global batch.
        attended: pairs of a packed token of the global batch with one it attends to.
        mean_chosen_tokens: mean completion tokens of the chosen responses of the global batch.
    """

    dataset: PairDataset
    micro_batches: tuple[tuple[int, ...], ...]
    pairs: int
    tokens: int
    targets: int
    attended: int
    mean_chosen_tokens: float

    def batches(self) -> Iterator[PackedBatch]:
        """This rank's micro-batches in order, on the host."""
        for rows in self.micro_batches:
            yield pack_rows(self.dataset, rows)


def plan_step(
    dataset: PairDataset,
    rows: Rows,
    rank: int,
    world_size: int,
    micro_batch_tokens: int,
    costs: ComputeCosts,
) -> StepPlan:
    """Divide the global batch `rows` among ranks and micro-batches, evenly by `costs`; O(batch)."""
    sizes = dataset.sizes(rows, dataset.response_places(rows), dataset.response_counts(rows), costs)
    plan = plan_micro_batches(sizes, world_size, micro_batch_tokens)
    targets, attended = dataset.work(rows)
    return StepPlan(
        dataset=dataset,
        micro_batches=tuple(tuple(int(rows[place]) for place in ranks[rank]) for ranks in plan),
        pairs=len(rows),
        tokens=int(sizes.tokens.sum()),
        targets=targets,
        attended=attended,
        mean_chosen_tokens=dataset.mean_chosen_tokens(rows),
    )


def pack_rows(dataset: PairDataset, rows: Sequence[int]) -> PackedBatch:
    """Whole pairs as one micro-batch; a dummy if there are none."""
    if not rows:
        return dummy_batch()
    keys = np.concatenate([dataset.keys[list(dataset.response_rows(row))] for row in rows])
    return pack([dataset.sequences(row) for row in rows], keys)
