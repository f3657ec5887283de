"""Who computes which pairs of a global batch: micro-batches of like cost, as few as hold the pairs.

A plan is a pure function of sizes, number of ranks and token budget, and every rank makes the whole of it, so
that ranks need not talk (law L2). Its cost is that of sorting the batch: pairs are placed many at a time.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]
Bins = npt.NDArray[np.int64]

_GROUPS = 128  # of pairs that are fitted at a time: as tight as one by one, in milliseconds
_CAPACITY_TRIALS = 3


@dataclass(frozen=True)
class ComputeCosts:
    """What a model's time goes to, in the time that its layers' matrices take for one token.

    Attributes:
        key: of a token that attends to one key, in all layers.
        target: of a target in the output layer.
    """

    key: float
    target: float


@dataclass(frozen=True)
class ExampleSizes:
    """What pairs take in packed batches, [pairs] each.

    Attributes:
        tokens: int64, packed tokens, which take memory.
        targets: int64, completion tokens.
        attended: int64, pairs of a packed token with one it attends to.
        costs: float64, time to compute them, in that of one token in the layers' matrices.
    """

    tokens: Counts
    targets: Counts
    attended: Counts
    costs: Costs

    def at(self, places: Counts) -> "ExampleSizes":
        """Of the pairs that stand there."""
        return ExampleSizes(
            self.tokens[places], self.targets[places], self.attended[places], self.costs[places]
        )


def example_sizes(
    prompt_tokens: Counts, response_tokens: Counts, responses: Counts, costs: ComputeCosts
) -> ExampleSizes:
    """Return the sizes of many examples.

    Args:
        prompt_tokens: int64 [pairs].
        response_tokens: int64 [responses of all pairs], pair after pair.
        responses: int64 [pairs], responses of each pair, at least one.
        costs: of the model that computes them.
    """
    firsts = np.cumsum(responses) - responses
    laid_out = response_tokens - 1
    in_responses = laid_out * np.repeat(prompt_tokens, responses) + laid_out * (laid_out + 1) // 2
    tokens = prompt_tokens + np.add.reduceat(laid_out, firsts)
    attended = prompt_tokens * (prompt_tokens + 1) // 2 + np.add.reduceat(in_responses, firsts)
    targets = np.add.reduceat(response_tokens, firsts)
    # A token's attention to itself is part of what a token costs.
    keys = attended - tokens / 2
    return ExampleSizes(tokens, targets, attended, tokens + costs.key * keys + costs.target * targets)


def plan_micro_batches(sizes: ExampleSizes, world_size: int, token_budget: int) -> list[list[list[int]]]:
    """Spread the pairs of one global batch over micro-batches and ranks.

    As few micro-batches as hold the pairs; among these, ranks of one micro-batch, and of the whole step, get
    work of the same cost, so that they wait little for each other. A pair above the budget has a micro-batch
    of its rank to itself.

    Args:
        sizes: of each pair.
        world_size: number of ranks.
        token_budget: tokens that fit in one micro-batch.

    Returns:
        ``plan[micro_batch][rank]``: places in `sizes`; empty where a rank computes a dummy. Every rank has
        the same number of micro-batches (law L2).
    """
    if not len(sizes.tokens):
        return []
    tokens = np.minimum(sizes.tokens, token_budget)
    micro_batches = math.ceil(tokens.sum() / (world_size * token_budget))
    while True:
        bins = _fill_evenly(tokens, sizes.costs, world_size, micro_batches, token_budget)
        if bins is None:
            bins = _fill_tightly(tokens, world_size * micro_batches, token_budget)
        if bins is not None:
            return _deal_to_ranks(bins, sizes.costs, world_size, micro_batches)
        micro_batches += 1


def _fill_evenly(
    tokens: Counts, costs: Costs, world_size: int, micro_batches: int, budget: int
) -> Bins | None:
    """Dearest pair first into the bin of least cost that has room (LPT); None if none has.

    Bins of a micro-batch that is to take less than the first start as if they held the difference. The bins
    that are certain to get a pair before any of them gets a second one are served at once.
    """
    heights = _heights(costs, world_size, micro_batches)
    loads = np.repeat(heights[0] - heights, world_size)
    rooms = np.full(world_size * micro_batches, budget)
    dearest_first = np.argsort(-costs, kind="stable")
    costs, tokens = costs[dearest_first], tokens[dearest_first]
    bins = np.empty(len(costs), dtype=np.int64)
    done = 0
    while done < len(costs):
        open_bins = np.flatnonzero(rooms >= tokens[done])
        if not len(open_bins):
            return None
        lowest_first = open_bins[np.argsort(loads[open_bins], kind="stable")][: len(costs) - done]
        pairs = slice(done, done + len(lowest_first))
        served = (loads[lowest_first] - loads[lowest_first[0]] <= costs[pairs]) & (
            rooms[lowest_first] >= tokens[pairs]
        )
        count = len(served) if served.all() else int(served.argmin())
        pairs, lowest_first = slice(done, done + count), lowest_first[:count]
        loads[lowest_first] += costs[pairs]
        rooms[lowest_first] -= tokens[pairs]
        bins[dearest_first[pairs]] = lowest_first
        done += count
    return bins


def _heights(costs: Costs, world_size: int, micro_batches: int) -> Costs:
    """The cost that a rank is to have in each micro-batch, falling: where a pair costs more than an even
    share, the other ranks of its micro-batch get as much.
    """
    dearest = np.zeros(micro_batches)
    falling = np.sort(costs)[::-1][::world_size][:micro_batches]
    dearest[: len(falling)] = falling
    heights = np.empty(micro_batches)
    left = costs.sum() / world_size
    for place in range(micro_batches):
        heights[place] = max(left / (micro_batches - place), min(dearest[place], left))
        left -= heights[place]
    return heights


def _fill_tightly(tokens: Counts, number: int, budget: int) -> Bins | None:
    """Best fit, into the smallest bins that a few trials find to do (Coffman, Garey, Johnson 1978)."""
    longest_first = np.argsort(-tokens, kind="stable")
    falling = tokens[longest_first]
    fitted = _fit(falling, number, budget)
    if fitted is None:
        return None
    too_small, capacity = int(tokens.sum()) // number, budget
    for _ in range(_CAPACITY_TRIALS):
        middle = (too_small + capacity) // 2
        tighter = _fit(falling, number, middle)
        if tighter is None:
            too_small = middle
        else:
            fitted, capacity = tighter, middle
    bins = np.empty_like(fitted)
    bins[longest_first] = fitted
    return bins


def _fit(tokens: Counts, number: int, capacity: int) -> Bins | None:
    """Longest pair first into the fullest bin that has room for it, a group of pairs at a time into as many
    bins; None if no bin has room for a pair.
    """
    rooms, names = np.full(number, capacity), np.arange(number)
    bins = np.empty(len(tokens), dtype=np.int64)
    done, group = 0, math.ceil(len(tokens) / _GROUPS)
    while done < len(tokens):
        rising = tokens[done : done + group][::-1]
        # The first bin with room for each, or the next that no shorter pair of the group has taken.
        offsets = np.arange(len(rising))
        taken = np.maximum.accumulate(np.searchsorted(rooms, rising) - offsets) + offsets
        if taken[-1] >= number:
            if len(rising) == 1:
                return None
            group = math.ceil(len(rising) / 2)
            continue
        bins[done : done + len(rising)] = names[taken][::-1]
        done += len(rising)
        rooms[taken] -= rising
        fullest_first = np.argsort(rooms, kind="stable")
        rooms, names = rooms[fullest_first], names[fullest_first]
    return bins


def _deal_to_ranks(bins: Bins, costs: Costs, world_size: int, micro_batches: int) -> list[list[list[int]]]:
    """Bins of similar cost share a micro-batch; there the rank that has done least gets the dearest."""
    number = world_size * micro_batches
    loads = np.bincount(bins, costs, number)
    turns = np.empty(number, dtype=np.int64)
    done = np.zeros(world_size)
    for micro_batch, dearest in enumerate(np.argsort(-loads, kind="stable").reshape(-1, world_size)):
        idle_first = np.argsort(done, kind="stable")
        done[idle_first] += loads[dearest]
        turns[dearest] = micro_batch * world_size + idle_first
    turn_of_pair = turns[bins]
    pairs = np.argsort(turn_of_pair, kind="stable")
    ends = np.cumsum(np.bincount(turn_of_pair, minlength=number))
    contents = [part.tolist() for part in np.split(pairs, ends[:-1])]
    return [contents[start : start + world_size] for start in range(0, number, world_size)]
