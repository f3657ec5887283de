"""Assign the examples of a global batch to ranks and micro-batches, by their compute costs."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.costs import Arrangement, ComputeCosts, Costs, ExampleSizes
from dpo_dist.batching.prefixes import Counts, Prefixes


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

_CUTS = 8  # trials
_ROW_TRIALS = 12
_LESS_PADDING = 0.9  # smaller micro-batches have to compute at most this share of the larger ones' tokens
_ENOUGH_TOKENS = 2048  # of a micro-batch that keeps a device busy


def plan_micro_batches(
    sizes: ExampleSizes, world_size: int, token_budget: int, costs: ComputeCosts | None = None
) -> list[list[list[int]]]:
    """Assign the examples of a global batch to micro-batches and ranks.

    Examples, costliest first, go to as few micro-batches as can hold them in this order, rarely one more than
    the tightest packing. The ranks get work of equal cost in each micro-batch and in the whole step, so that
    they wait little for each other. An example above the budget is alone in its micro-batch. With `costs`,
    examples that begin alike are dealt out together where that takes less time, in no more micro-batches.

    `token_budget`: tokens that fit in one micro-batch, with their padding. Returns indices in `sizes` by
    micro-batch and rank; an empty list is a dummy: all ranks have the same number of micro-batches (law L2).
    """
    if not len(sizes.tokens):
        return []
    if sizes.rows is not None and sizes.longest is not None:
        row_bins, number = _fill_rows(sizes.rows, sizes.longest, world_size, token_budget)
        return _assign_to_ranks(row_bins, sizes.costs, world_size, number)
    bins, number = _fill_fewest(sizes.tokens, sizes.costs, world_size, token_budget)
    if costs is None or sizes.prefixes is None:
        return _assign_to_ranks(bins, sizes.costs, world_size, number)
    return _assign_to_ranks(*_fill_together(sizes, costs, world_size, token_budget, (bins, number)))


class Shares(NamedTuple):
    """What examples share with others of their bin, [examples] each."""

    tokens: Counts  # leading tokens that another example computes
    time: Costs  # saved by that
    memory: Counts  # saved by that, in tokens: each response has copies of the keys of shared tokens


def shares_in_bins(sizes: ExampleSizes, costs: ComputeCosts, bins: Bins) -> Shares:
    """Return what examples share with others of their bin; `pack` may find that they share more."""
    prefixes, shared = sizes.prefixes, np.zeros_like(sizes.tokens)
    if prefixes is None:
        return Shares(shared, np.zeros_like(sizes.costs), shared)
    assert sizes.longest is not None
    assert sizes.responses is not None
    order = _order_by_ids(prefixes, bins)
    common = prefixes.select(order).common_with_previous()
    is_first = np.diff(bins[order], prepend=-1) != 0
    # The longest row: any of the example's rows may be the one that comes first in the packed sequence.
    shared[order] = costs.worth_sharing(np.where(is_first, 0, common), sizes.longest[order])
    copies = np.ceil(costs.gather_memory * shared * sizes.responses).astype(np.int64)
    return Shares(shared, costs.saved_by_sharing(shared, sizes.longest - shared), shared - copies)


def deal_out(sizes: ExampleSizes, costs: ComputeCosts, ranks: int) -> list[Counts]:
    """Return the examples of each rank, of about equal cost, and if possible of those that begin alike."""
    if sizes.prefixes is None:
        return [np.argsort(-sizes.costs, kind="stable")[rank::ranks] for rank in range(ranks)]
    together = np.zeros_like(sizes.tokens)
    order = _order_by_ids(sizes.prefixes, together)
    rest = (sizes.costs - shares_in_bins(sizes, costs, together).time)[order]
    middles = np.cumsum(rest) - rest / 2
    return np.split(order, np.searchsorted(middles, rest.sum() * np.arange(1, ranks) / ranks))


def _order_by_ids(prefixes: Prefixes, bins: Bins) -> Counts:
    return np.lexsort((-prefixes.rows, prefixes.places, bins))


def _fill_together(
    sizes: ExampleSizes, costs: ComputeCosts, world_size: int, budget: int, plain: tuple[Bins, int]
) -> tuple[Bins, Costs, int, int]:
    """Return the bin of each example, its cost there, and the numbers of ranks and micro-batches.

    `plain`, the bins and micro-batches for examples that share nothing, is kept unless other bins take less
    time in as few micro-batches. Tried are consecutive examples in the order of their token ids, bundles of
    those that begin alike, and examples in any order, where all of them share some tokens.
    """
    together = np.zeros_like(sizes.tokens)
    shares = shares_in_bins(sizes, costs, together)
    if sizes.prefixes is None or not shares.tokens.any():
        return plain[0], sizes.costs, world_size, plain[1]
    order = _order_by_ids(sizes.prefixes, together)
    chain = _Chain(sizes, shares, order, budget)

    def spread(starts: Sequence[int], bins: Bins) -> Bins:
        return np.repeat(bins, np.diff([*starts, len(order)]))[np.argsort(order)]

    even, bundles = chain.cut_evenly(world_size), chain.cut(in_runs=True)
    filled, number = _fill_fewest(*chain.bundle_sizes(bundles), world_size, budget)
    found = [plain, (spread(even, np.arange(len(even))), -(-len(even) // world_size))]
    found.append((spread(bundles, filled), number))
    common = int(chain.saved_tokens[1:].min())
    if 0 < common < budget:
        rest = sizes.costs - chain.saved_time[1:].min()
        found.append(_fill_fewest(sizes.tokens - common, rest, world_size, budget - common))

    def time(assigned: tuple[Bins, int]) -> float:
        bins, number = assigned
        shares = shares_in_bins(sizes, costs, bins)
        is_above = np.bincount(bins, sizes.tokens - shares.memory) > budget
        if number > plain[1] or (is_above & (np.bincount(bins) > 1)).any():
            return math.inf
        loads = np.bincount(bins, sizes.costs - shares.time, world_size * number)
        return float(np.sort(loads)[::-1][::world_size].sum())

    bins, number = min(found, key=time)
    return bins, sizes.costs - shares_in_bins(sizes, costs, bins).time, world_size, number


class _Chain:
    """Examples in the order of their token ids, and bundles of consecutive ones."""

    def __init__(self, sizes: ExampleSizes, shares: Shares, order: Counts, budget: int):
        self.saved_tokens, self.saved_time, self._budget = shares.memory[order], shares.time[order], budget
        self._tokens = sizes.tokens[order] - self.saved_tokens
        self._costs = sizes.costs[order] - self.saved_time
        self._token_ends = np.insert(np.cumsum(self._tokens), 0, 0).tolist()
        self._cost_ends = np.insert(np.cumsum(self._costs), 0, 0).tolist()
        runs = np.append(np.flatnonzero(shares.tokens[order] == 0), len(order))
        self._run_ends = np.repeat(runs[1:], np.diff(runs)).tolist()

    def bundle_sizes(self, starts: Sequence[int]) -> tuple[Counts, Costs]:
        """Return the tokens and the costs of the bundles that begin at `starts`."""
        tokens = np.add.reduceat(self._tokens, starts) + self.saved_tokens[starts]
        return tokens, np.add.reduceat(self._costs, starts) + self.saved_time[starts]

    def cut(self, cap: float = math.inf, *, in_runs: bool = False) -> list[int]:
        """Return where bundles begin that are as large as the budget and `cap`, a cost, allow.

        With `in_runs`, only examples that share tokens are in one bundle.
        """
        starts, start, last = list[int](), 0, len(self._tokens)
        while start < last:
            starts.append(start)
            tokens = self._token_ends[start] - self.saved_tokens[start] + self._budget
            cost = self._cost_ends[start] - self.saved_time[start] + cap
            fitting = min(bisect_right(self._token_ends, tokens), bisect_right(self._cost_ends, cost)) - 1
            start = max(start + 1, min(fitting, self._run_ends[start] if in_runs else last))
        return starts

    def cut_evenly(self, world_size: int) -> list[int]:
        """Return where the smallest bundles begin that are enough for as few micro-batches as possible."""
        starts = self.cut()
        most = -(-len(starts) // world_size) * world_size
        low, high = self._cost_ends[-1] / len(self._tokens), self._cost_ends[-1]
        for _ in range(_CUTS):
            cap = math.sqrt(low * high)
            smaller = self.cut(cap)
            if len(smaller) > most:
                low = cap
            else:
                starts, high = smaller, cap
        return starts


def _fill_fewest(tokens: Counts, costs: Costs, world_size: int, budget: int) -> tuple[Bins, int]:
    """Return the bin of each example, and the number of micro-batches, which is the fewest that has space."""
    tokens = np.minimum(tokens, budget)
    # A bin has no space for two of more than half the budget.
    least = max(tokens.sum() / budget, np.count_nonzero(2 * tokens > budget))
    micro_batches = max(1, math.ceil(least / world_size))
    while True:
        bins = _fill_evenly(tokens, costs, world_size, micro_batches, budget)
        if bins is not None:
            return bins, micro_batches
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
