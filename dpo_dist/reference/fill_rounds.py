"""What a fill computes, divided into rounds of so many pairs, and each round among ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.micro_batches import ComputeCosts, plan_micro_batches
from dpo_dist.data.sampler import Indices

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """Pairs with the responses of them that are to be scored, as arrays: they may be many millions.

    Attributes:
        rows: int64 [pairs], ascending.
        stops: int64 [pairs], where each pair's responses end in `places`.
        places: int64 [responses], where their keys stand in the data set's `keys`.
        which: int64 [responses], which of its pair's responses each is.
    """

    rows: Indices
    stops: Indices
    places: Places
    which: Indices

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> "Work":
        """The pairs ``start <= number < stop``."""
        first = int(self.stops[start - 1]) if start else 0
        rows, stops = self.rows[start:stop], self.stops[start:stop] - first
        responses = slice(first, first + int(stops[-1]))
        return Work(rows, stops, self.places[responses], self.which[responses])

    def where(self, wanted: npt.NDArray[np.bool_]) -> "Work":
        """The responses that are `wanted`, bool [responses]."""
        pairs = np.repeat(np.arange(len(self)), np.diff(self.stops, prepend=0))[wanted]
        distinct, counts = np.unique(pairs, return_counts=True)
        return Work(self.rows[distinct], np.cumsum(counts), self.places[wanted], self.which[wanted])


def by_pair(dataset: PreferenceDataset, places: Places) -> Work:
    """The work that these `places`, ascending, are."""
    rows, which = dataset.locate_responses(places)
    distinct, counts = np.unique(rows, return_counts=True)
    return Work(distinct, np.cumsum(counts), places, which)


@dataclass(frozen=True)
class Round:
    """What all ranks score before they write: `work`, and the numbers in it of one rank's micro-batches."""

    work: Work
    micro_batches: list[list[int]]


def in_rounds(work: Work, pairs: int, seed: int) -> Iterator[Work]:
    """Divide `work` into rounds of so many pairs, in an order that follows from `seed`."""
    for number in np.random.default_rng(seed).permutation(-(-len(work) // pairs)).tolist():
        yield work.part(number * pairs, (number + 1) * pairs)


def plan_round(
    dataset: PreferenceDataset,
    rank: int,
    world_size: int,
    micro_batch_tokens: int,
    costs: ComputeCosts,
    work: Work,
) -> Round:
    """The micro-batches of `work` that are `rank`'s.

    A round has thousands of pairs for each rank: dealt out in order of cost, ranks get nearly the same, and
    each plans its own only.
    """
    sizes = dataset.sizes(work.rows, work.places, np.diff(work.stops, prepend=0), costs)
    mine = np.argsort(-sizes.costs, kind="stable")[rank::world_size]
    plan = plan_micro_batches(sizes.at(mine), 1, micro_batch_tokens)
    return Round(work, [mine[places].tolist() for (places,) in plan])
