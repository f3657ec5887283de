"""Assign the examples of a global batch to ranks and micro-batches, by their compute costs."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.costs import Arrangement, ComputeCosts, Costs, ExampleSizes
from dpo_dist.batching.prefixes import Counts, Prefixes

Bins = npt.NDArray[np.int64]
"""The bin of each example; a bin is one rank's share of a micro-batch."""

# A micro-batch that is only scored has this many tokens for each token of a training micro-batch.
# With hidden size h, training keeps 50 to 70 h bytes of activations per token and layer (docs/scaling.md;
# arXiv:2205.05198 counts 34 h), or 2 h plus those of one layer with gradient checkpointing; scoring keeps
# those of one layer. With 28 layers, four times the tokens need a seventh of training's activation memory.
# With checkpointing they need twice as much, which fits because gradients and optimizer states do not exist
# yet.
SCORING_TOKENS_FACTOR = 4

_CUT_TRIALS = 8  # halvings of the logarithm's range: of the largest of 1,000 sizes, 3 % are left open
_MIN_EXTRA_SHARING = 1.25  # examples of a bundle share more than this many times what all share
_ROW_TRIALS = 12  # halvings of the range of a capacity in tokens
_LESS_PADDING = 0.9  # smaller micro-batches have to compute at most this share of the larger ones' tokens
_ENOUGH_TOKENS = 2048  # of a micro-batch that keeps a device busy


def consecutive_batches(
    layout: Sequence[Sequence[int]], budget: int, arrangement: Arrangement
) -> list[range]:
    """Return micro-batches of consecutive examples, indices in `layout`, of at most `budget` computed tokens.

    `layout`: `Example.layout` of each. A longer example is a micro-batch of its own.
    """
    rows = [[prompt + tokens for tokens in responses] for prompt, *responses in layout]
    batches: list[range] = []
    for stop in range(1, len(layout) + 1):
        start = batches[-1].start if batches else 0
        lengths = [*chain.from_iterable(rows[start:stop])]
        tokens = arrangement.computed_tokens(sum(map(sum, layout[start:stop])), lengths)
        if batches and tokens <= budget:
            batches[-1] = range(start, stop)
        else:
            batches.append(range(stop - 1, stop))
    return batches


def plan_micro_batches(
    sizes: ExampleSizes, world_size: int, token_budget: int, costs: ComputeCosts
) -> list[list[list[int]]]:
    """Assign the examples of a global batch to micro-batches and ranks.

    Examples, costliest first, go to as few micro-batches as can hold them in this order, rarely one more than
    the tightest packing. The ranks get work of equal cost in each micro-batch and in the whole step, so that
    they wait little for each other. An example above the budget is alone in its micro-batch. Examples that
    begin alike are dealt out together where that takes less time by `costs`, in no more micro-batches.

    `token_budget`: tokens that fit in one micro-batch, with their padding. Returns indices in `sizes` by
    micro-batch and rank; an empty list is a dummy: all ranks have the same number of micro-batches (law L2).
    """
    if not len(sizes.tokens):
        return []
    # Few micro-batches before even ones: under ZeRO-3 each gathers all weights for forward and backward.
    if costs.pads_rows:
        bins, number = _fill_rows(sizes.responses, sizes.longest, world_size, token_budget)
    else:
        bins, number = _fill_fewest(sizes.tokens, sizes.costs, world_size, token_budget)
        bins, number = _fill_together(sizes, costs, world_size, token_budget, (bins, number))
    times = sizes.costs - shares_in_bins(sizes, costs, bins).time
    return _assign_to_ranks(bins, times, world_size, number)


class Shares(NamedTuple):
    """What examples share with others of their bin, [examples] each."""

    tokens: Counts  # leading tokens that another example computes
    time: Costs  # saved by that
    memory: Counts  # saved by that, in tokens: each response has copies of the keys of shared tokens


def shares_in_bins(sizes: ExampleSizes, costs: ComputeCosts, bins: Bins) -> Shares:
    """Return what examples share with others of their bin; `pack` may find that they share more."""
    prefixes = sizes.prefixes
    shared = np.zeros_like(sizes.tokens)
    if prefixes is None:
        return Shares(shared, np.zeros_like(sizes.costs), shared)
    order = _order_by_ids(prefixes, bins)
    common = prefixes.select(order).common_with_previous()
    is_first = np.diff(bins[order], prepend=-1) != 0
    # The longest row: any of the example's rows may be the one that comes first in the packed sequence.
    shared[order] = costs.worth_sharing(np.where(is_first, 0, common), sizes.longest[order])
    copies = np.ceil(costs.copy_memory * shared * sizes.responses).astype(np.int64)
    return Shares(shared, costs.saved_by_sharing(shared, sizes.longest - shared), shared - copies)


def fits_in_bins(sizes: ExampleSizes, costs: ComputeCosts, bins: Bins, budget: int) -> bool:
    """Return whether each bin of several examples, which may be padded, has at most `budget` tokens."""
    members = np.bincount(bins)
    if costs.pads_rows:
        longest = np.zeros(len(members), dtype=np.int64)
        np.maximum.at(longest, bins, sizes.longest)
        tokens = longest * np.bincount(bins, sizes.responses)
    else:
        tokens = np.bincount(bins, sizes.tokens - shares_in_bins(sizes, costs, bins).memory)
    return not ((tokens > budget) & (members > 1)).any()


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
) -> tuple[Bins, int]:
    """Return the bin of each example, and the number of micro-batches.

    `plain`, the bins and micro-batches for examples that share nothing, is kept unless other bins take less
    time in as few micro-batches. Tried are consecutive examples in the order of their token ids, and bundles
    of those that share more than every example does.
    """
    one_bin = np.zeros_like(sizes.tokens)
    shares = shares_in_bins(sizes, costs, one_bin)
    if sizes.prefixes is None or not shares.tokens.any():
        return plain
    order = _order_by_ids(sizes.prefixes, one_bin)
    ordered = _Ordered(sizes, shares, order, budget)

    def bins_of_examples(starts: Sequence[int], bins: Bins) -> Bins:
        """Return the bin of each example; `starts`, `bins`: where each bundle starts in `order`, its bin."""
        return np.repeat(bins, np.diff([*starts, len(order)]))[np.argsort(order)]

    # A bin for each even bundle, or the bundles of those that share most as if each were one example.
    even = ordered.cut_evenly(world_size)
    alike = ordered.cut(in_runs=True)
    filled, number = _fill_fewest(*ordered.bundle_sizes(alike), world_size, budget - ordered.common)
    candidates = [
        plain,
        (bins_of_examples(even, np.arange(len(even))), -(-len(even) // world_size)),
        (bins_of_examples(alike, filled), number),
    ]

    def step_time(candidate: tuple[Bins, int]) -> float:
        bins, number = candidate
        shares = shares_in_bins(sizes, costs, bins)
        # One more micro-batch gathers all weights once more under ZeRO-3, which `costs` do not know.
        if number > plain[1] or not fits_in_bins(sizes, costs, bins, budget):
            return math.inf
        # The ranks of a micro-batch wait for the costliest.
        loads = np.bincount(bins, sizes.costs - shares.time, world_size * number)
        return float(loads[_bins_of_similar_cost(loads, world_size)[:, 0]].sum())

    return min(candidates, key=step_time)


class _Ordered:
    """Examples in the order of their token ids, and how to cut them into bundles of consecutive ones.

    Sizes are float64 [2, examples]: tokens, which the budget limits, and compute time. A bundle has the own
    sizes of its examples, and what its first example shares with the one before, which is in another bundle.
    """

    def __init__(self, sizes: ExampleSizes, shares: Shares, order: Counts, budget: int):
        shared_tokens = shares.tokens[order]
        saved = np.stack((shares.memory, shares.time))[:, order]
        # Every bin computes the prefix that all examples share: `bundle_sizes` and its caller's budget leave
        # it out. The first example shares it, too, although no example is before it.
        # Three rows of 150 tokens, of which the second shares 100 with the first, the third 130 with the
        # second: saved [100, 100, 130], common 100, own [50, 50, 20], ends [0, 50, 100, 120].
        common = saved[:, 1:].min(axis=1)
        if 0 < common[0] < budget:
            saved[:, 0] = common
        self._budget = budget
        self.common = int(saved[0, 0])
        self._saved = saved
        self._own = np.stack((sizes.tokens, sizes.costs))[:, order] - saved
        self._ends = np.insert(np.cumsum(self._own, axis=1), 0, 0, axis=1).tolist()
        # A run goes on while an example shares clearly more with the one before than all examples share.
        least_tokens = shared_tokens[1:].min()
        run_starts = np.flatnonzero(shared_tokens <= _MIN_EXTRA_SHARING * least_tokens)
        runs = np.append(run_starts, len(order))
        self._run_ends = np.repeat(runs[1:], np.diff(runs)).tolist()

    def bundle_sizes(self, starts: Sequence[int]) -> tuple[Counts, Costs]:
        """Return the tokens and the costs of the bundles that begin at `starts`, without the common ones."""
        bundles = np.add.reduceat(self._own, starts, axis=1) + self._saved[:, starts] - self._saved[:, :1]
        return bundles[0].astype(np.int64), bundles[1]

    def cut(self, cap: float = math.inf, *, in_runs: bool = False) -> list[int]:
        """Return where bundles begin that are as large as the budget and `cap`, a time, allow.

        With `in_runs`, only examples that share clearly more than all do are in one bundle.
        """
        starts = list[int]()
        start = 0
        last = len(self._run_ends)
        while start < last:
            starts.append(start)
            # A bundle has `ends[stop] - ends[start] + saved[start]`. With the rows of `__init__` and a budget
            # of 200, the first ends before the largest end up to 0 - 100 + 200, which is that of two rows.
            of_sizes = zip(self._ends, self._saved[:, start], (self._budget, cap), strict=True)
            stops = [bisect_right(ends, ends[start] - saved + limit) - 1 for ends, saved, limit in of_sizes]
            run_end = self._run_ends[start] if in_runs else last
            start = max(start + 1, min(*stops, run_end))
        return starts

    def cut_evenly(self, world_size: int) -> list[int]:
        """Return where the smallest bundles begin that are enough for as few micro-batches as possible."""
        starts = self.cut()
        most = -(-len(starts) // world_size) * world_size
        low, high = self._ends[1][-1] / len(self._run_ends), self._ends[1][-1]
        for _ in range(_CUT_TRIALS):
            cap = math.sqrt(low * high)  # costs of examples range over orders of magnitude
            smaller = self.cut(cap)
            if len(smaller) > most:
                low = cap
            else:
                starts, high = smaller, cap
        return starts


def _fill_fewest(tokens: Counts, costs: Costs, world_size: int, budget: int) -> tuple[Bins, int]:
    """Return the bin of each example, and the number of micro-batches, which is the fewest that has space."""
    tokens = np.minimum(tokens, budget)
    # Bounds from below, so that a hopeless number is not tried: the sum, and that a bin has no space for two
    # examples of more than half the budget.
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
    """Assign each example, costliest first, to the bin of least cost that has space; None if none has."""
    # The cost per rank to aim at in each micro-batch, descending: if one example costs more than an even
    # share, the other ranks of its micro-batch get as much.
    descending = np.zeros(micro_batches)
    costliest = np.sort(costs)[::-1][::world_size][:micro_batches]
    descending[: len(costliest)] = costliest
    targets = np.empty(micro_batches)
    left = costs.sum() / world_size
    for micro_batch in range(micro_batches):
        targets[micro_batch] = max(left / (micro_batches - micro_batch), min(descending[micro_batch], left))
        left -= targets[micro_batch]
    # LPT (Graham 1969, doi:10.1137/0117045): where all have space, at most a third above the best. Bins of a
    # smaller target than the first start with the difference as load. All bins that would get an example
    # before any of them gets a second one are filled at once, because a call of numpy takes as long for one
    # example as for a hundred.
    loads = np.repeat(targets[0] - targets, world_size)
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
        is_before_second = loads[lowest_first] - loads[lowest_first[0]] <= costs[batch]
        fits = is_before_second & (free[lowest_first] >= tokens[batch])
        count = len(fits) if fits.all() else int(fits.argmin())
        batch = slice(done, done + count)
        lowest_first = lowest_first[:count]
        loads[lowest_first] += costs[batch]
        free[lowest_first] -= tokens[batch]
        bins[costliest_first[batch]] = lowest_first
        done += count
    return bins


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
    while budget // 2 >= _ENOUGH_TOKENS:
        budget //= 2
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
        start = stop
        number += 1
    return bins


def _bins_of_similar_cost(loads: npt.NDArray[Any], world_size: int) -> Bins:
    """Return the bins of each micro-batch, costliest first, int64 [micro-batches, ranks].

    Ranks wait for each other in each micro-batch, where ZeRO-3 gathers weights, and again at the end of the
    step: so costs are alike in a micro-batch first, and then in the sum of all.
    """
    return np.argsort(-loads, kind="stable").reshape(-1, world_size)


def _assign_to_ranks(bins: Bins, costs: Costs, world_size: int, micro_batches: int) -> list[list[list[int]]]:
    """Put bins of similar cost into one micro-batch; the rank with the least work gets the costliest."""
    number = world_size * micro_batches
    loads = np.bincount(bins, costs, number)
    slots = np.empty(number, dtype=np.int64)
    done = np.zeros(world_size)
    for micro_batch, costliest in enumerate(_bins_of_similar_cost(loads, world_size)):
        idle_first = np.argsort(done, kind="stable")
        done[idle_first] += loads[costliest]
        slots[costliest] = micro_batch * world_size + idle_first
    slot_of_example = slots[bins]
    examples = np.argsort(slot_of_example, kind="stable")
    ends = np.cumsum(np.bincount(slot_of_example, minlength=number))
    contents = [part.tolist() for part in np.split(examples, ends[:-1])]
    return [contents[start : start + world_size] for start in range(0, number, world_size)]
