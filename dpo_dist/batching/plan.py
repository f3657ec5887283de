"""Assign the examples of a global batch to ranks and micro-batches, by their compute costs."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.costs import Arrangement, Costs, ExampleSizes
from dpo_dist.batching.prefixes import Counts


def computed_tokens(layout: Sequence[Sequence[int]], arrangement: Arrangement) -> int:
    """Return the tokens that the forwards of a micro-batch compute, with their padding.

    `layout`, as in `PackedBatch`: for each example, the tokens of its prompt and of each response.
    """
    if arrangement is Arrangement.packed:
        return sum(map(sum, layout))
    rows = [prompt + tokens for prompt, *responses in layout for tokens in responses]
    return len(rows) * max(rows) if arrangement is Arrangement.padded else sum(rows)


def consecutive_batches(
    layout: Sequence[Sequence[int]], budget: int, arrangement: Arrangement
) -> list[range]:
    """Return micro-batches of consecutive examples, indices in `layout`, of at most `budget` computed tokens.

    A longer example is a micro-batch of its own.
    """
    batches: list[range] = []
    for stop in range(1, len(layout) + 1):
        start = batches[-1].start if batches else 0
        if batches and computed_tokens(layout[start:stop], arrangement) <= budget:
            batches[-1] = range(start, stop)
        else:
            batches.append(range(stop - 1, stop))
    return batches


Bins = npt.NDArray[np.int64]

_ROW_TRIALS = 12
_LESS_PADDING = 0.9  # smaller micro-batches have to compute at most this share of the larger ones' tokens
_ENOUGH_TOKENS = 2048  # of a micro-batch that keeps a device busy


def plan_micro_batches(sizes: ExampleSizes, world_size: int, token_budget: int) -> list[list[list[int]]]:
    """Assign the examples of a global batch to micro-batches and ranks.

    Examples, costliest first, go to as few micro-batches as can hold them in this order, rarely one more than
    the tightest packing. The ranks get work of equal cost in each micro-batch and in the whole step, so that
    they wait little for each other. An example above the budget is alone in its micro-batch.

    `token_budget`: tokens that fit in one micro-batch, with their padding. Returns indices in `sizes` by
    micro-batch and rank; an empty list is a dummy: all ranks have the same number of micro-batches (law L2).
    """
    if not len(sizes.tokens):
        return []
    if sizes.rows is not None and sizes.longest is not None:
        row_bins, number = _fill_rows(sizes.rows, sizes.longest, world_size, token_budget)
        return _assign_to_ranks(row_bins, sizes.costs, world_size, number)
    tokens = np.minimum(sizes.tokens, token_budget)
    micro_batches = math.ceil(tokens.sum() / (world_size * token_budget))
    while True:
        bins = _fill_evenly(tokens, sizes.costs, world_size, micro_batches, token_budget)
        if bins is not None:
            return _assign_to_ranks(bins, sizes.costs, world_size, micro_batches)
        micro_batches += 1


def _fill_evenly(
    tokens: Counts, costs: Costs, world_size: int, micro_batches: int, budget: int
) -> Bins | None:
    """Assign each example, costliest first, to the bin of least cost that has space (LPT); None if none has.

    Bins of a micro-batch with a smaller target cost than the first start with the difference as load. All
    bins that would get an example before any of them gets a second one are filled in one iteration.
    """
    target_costs = _target_costs(costs, world_size, micro_batches)
    loads = np.repeat(target_costs[0] - target_costs, world_size)
    free = np.full(world_size * micro_batches, budget)
    costliest_first = np.argsort(-costs, kind="stable")
    costs, tokens = costs[costliest_first], tokens[costliest_first]
    bins = np.empty(len(costs), dtype=np.int64)
    done = 0
    while done < len(costs):
        open_bins = np.flatnonzero(free >= tokens[done])
        if not len(open_bins):
            return None
        lowest_first = open_bins[np.argsort(loads[open_bins], kind="stable")][: len(costs) - done]
        batch = slice(done, done + len(lowest_first))
        fits = (loads[lowest_first] - loads[lowest_first[0]] <= costs[batch]) & (
            free[lowest_first] >= tokens[batch]
        )
        count = len(fits) if fits.all() else int(fits.argmin())
        batch, lowest_first = slice(done, done + count), lowest_first[:count]
        loads[lowest_first] += costs[batch]
        free[lowest_first] -= tokens[batch]
        bins[costliest_first[batch]] = lowest_first
        done += count
    return bins


def _target_costs(costs: Costs, world_size: int, micro_batches: int) -> Costs:
    """Return the cost per rank to aim at in each micro-batch, descending.

    If one example costs more than an even share, the other ranks of its micro-batch get as much.
    """
    costliest = np.zeros(micro_batches)
    descending = np.sort(costs)[::-1][::world_size][:micro_batches]
    costliest[: len(descending)] = descending
    targets = np.empty(micro_batches)
    left = costs.sum() / world_size
    for micro_batch in range(micro_batches):
        targets[micro_batch] = max(left / (micro_batches - micro_batch), min(costliest[micro_batch], left))
        left -= targets[micro_batch]
    return targets


def _fill_rows(rows: Counts, longest: Counts, world_size: int, budget: int) -> tuple[Bins, int]:
    """Put examples of similar lengths into one bin; all its rows are padded to the longest.

    Return the bin of each example, and the number of micro-batches: as few as possible, but smaller ones need
    less padding, and the budget is halved while that saves a tenth of all computed tokens and is enough work.
    """

    def tokens(bins: Bins) -> int:
        widths = np.zeros(len(rows), dtype=np.int64)
        np.maximum.at(widths, bins, longest)
        return int((rows * widths[bins]).sum())

    filled = _fill_rows_evenly(rows, longest, world_size, budget)
    budget = min(budget, tokens(filled[0]))
    while (budget := budget // 2) >= _ENOUGH_TOKENS:
        smaller = _fill_rows_evenly(rows, longest, world_size, budget)
        if tokens(smaller[0]) > _LESS_PADDING * tokens(filled[0]):
            break
        filled = smaller
    return filled


def _fill_rows_evenly(rows: Counts, longest: Counts, world_size: int, budget: int) -> tuple[Bins, int]:
    """Return the bin of each example, and the number of micro-batches, which is the fewest.

    Bins are the smallest that a few trials find: then the ranks get about equal work.
    """
    bins = _cut_rows(rows, longest, budget)
    micro_batches = -(-int(bins.max() + 1) // world_size)
    too_small = 0
    for _ in range(_ROW_TRIALS):
        middle = (too_small + budget) // 2
        tighter = _cut_rows(rows, longest, middle)
        if tighter.max() >= world_size * micro_batches:
            too_small = middle
        else:
            bins, budget = tighter, middle
    return bins, micro_batches


def _cut_rows(rows: Counts, longest: Counts, capacity: int) -> Bins:
    """Cut the examples, longest first, into bins of at most `capacity` padded tokens, or of one example."""
    longest_first = np.argsort(-longest, kind="stable")
    before = np.concatenate(([0], np.cumsum(rows[longest_first])))
    bins = np.empty(len(rows), dtype=np.int64)
    start = number = 0
    while start < len(rows):
        most = capacity // int(longest[longest_first[start]])
        stop = max(start + 1, int(np.searchsorted(before, before[start] + most, side="right")) - 1)
        bins[longest_first[start:stop]] = number
        start, number = stop, number + 1
    return bins


def _assign_to_ranks(bins: Bins, costs: Costs, world_size: int, micro_batches: int) -> list[list[list[int]]]:
    """Put bins of similar cost into one micro-batch; the rank with the least work gets the costliest."""
    number = world_size * micro_batches
    loads = np.bincount(bins, costs, number)
    slots = np.empty(number, dtype=np.int64)
    done = np.zeros(world_size)
    for micro_batch, costliest in enumerate(np.argsort(-loads, kind="stable").reshape(-1, world_size)):
        idle_first = np.argsort(done, kind="stable")
        done[idle_first] += loads[costliest]
        slots[costliest] = micro_batch * world_size + idle_first
    slot_of_example = slots[bins]
    examples = np.argsort(slot_of_example, kind="stable")
    ends = np.cumsum(np.bincount(slot_of_example, minlength=number))
    contents = [part.tolist() for part in np.split(examples, ends[:-1])]
    return [contents[start : start + world_size] for start in range(0, number, world_size)]
