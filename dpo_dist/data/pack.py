"""Who computes which pairs, and how they lie in memory: no padding, every prompt once.

A packed micro-batch is one row of tokens. A pair is laid out as ``[prompt, response, response, ...]``; the
positions of every response restart at the prompt's length, and attention (model/attention.py) lets each
response see its own prompt only. A response's last token predicts nothing and is not laid out.
"""

import bisect
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

# Keys that a token may attend to until attention has cost as much as all else: 2 to 6 times the hidden size
# of usual models.
_KEYS_AS_DEAR_AS_A_TOKEN = 16_384
_CAPACITY_TRIALS = 4


@dataclass(frozen=True)
class Sequences:
    """One prompt and the responses to score after it (token ids)."""

    prompt_ids: Ids
    responses: tuple[Ids, ...]


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank.

    Attributes:
        input_ids: int64 [tokens].
        position_ids: int64 [tokens].
        layout: for each pair the lengths of its pieces in `input_ids`: prompt, response, response, ...
        predictors: int64 [targets], the place in `input_ids` whose hidden state predicts each target. The
            first token of every response is predicted by the prompt's last.
        targets: int64 [targets], completion tokens, response after response.
        response_tokens: int64 [responses], completion tokens of each response.
        keys: uint64 [responses, 2], content address of each response; none for a dummy. Stays on the host.
        weights: float32 [pairs], 1, or 0 for a dummy: a batch that only keeps the ranks in step (law L2).
        reference_logps: float32 [targets], the reference's log-probs, where they are known beforehand.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: tuple[tuple[int, ...], ...]
    predictors: Tensor
    targets: Tensor
    response_tokens: Tensor
    keys: npt.NDArray[np.uint64]
    weights: Tensor
    reference_logps: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens computed for real pairs."""
        return len(self.input_ids) if len(self.keys) else 0

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "PackedBatch":
        """The same batch in page-locked memory: a copy from there to a CUDA device does not hold the host."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def packed_tokens(prompt_tokens: int, response_tokens: Sequence[int]) -> int:
    """Tokens that a prompt with its responses takes in a packed batch."""
    return prompt_tokens + sum(tokens - 1 for tokens in response_tokens)


@dataclass(frozen=True)
class PairSizes:
    """What pairs take in packed batches.

    Attributes:
        tokens: int64 [pairs], packed tokens, which take memory.
        costs: float64 [pairs], time to compute them, in tokens that attend to nothing.
    """

    tokens: Counts
    costs: npt.NDArray[np.float64]


def pair_sizes(prompt_tokens: Counts, response_tokens: Counts, responses: Counts) -> PairSizes:
    """The sizes of many pairs.

    Args:
        prompt_tokens: int64 [pairs].
        response_tokens: int64 [responses of all pairs], pair after pair.
        responses: int64 [pairs], responses of each pair, at least one.
    """
    firsts = np.cumsum(responses) - responses
    laid_out = response_tokens - 1
    attended = laid_out * (np.repeat(prompt_tokens, responses) + laid_out / 2)
    tokens = prompt_tokens + np.add.reduceat(laid_out, firsts)
    attended_in_pair = prompt_tokens**2 / 2 + np.add.reduceat(attended, firsts)
    return PairSizes(tokens, tokens + attended_in_pair / _KEYS_AS_DEAR_AS_A_TOKEN)


def pack(sequences: Sequence[Sequences], keys: npt.NDArray[np.uint64]) -> PackedBatch:
    """Lay out `sequences`, whose responses have these content `keys`, as one micro-batch."""
    inputs: list[Ids] = []
    positions: list[npt.NDArray[np.int64]] = []
    predictors: list[npt.NDArray[np.int64]] = []
    layout: list[tuple[int, ...]] = []
    start = 0
    for pair in sequences:
        prompt_tokens = len(pair.prompt_ids)
        lengths = [prompt_tokens]
        inputs.append(pair.prompt_ids)
        positions.append(np.arange(prompt_tokens))
        boundary, start = start + prompt_tokens - 1, start + prompt_tokens
        for response in pair.responses:
            tokens = len(response) - 1
            inputs.append(response[:-1])
            positions.append(np.arange(prompt_tokens, prompt_tokens + tokens))
            predictors.append(np.concatenate(([boundary], np.arange(start, start + tokens))))
            lengths.append(tokens)
            start += tokens
        layout.append(tuple(lengths))
    responses = [response for pair in sequences for response in pair.responses]
    return PackedBatch(
        input_ids=_int64(np.concatenate(inputs)),
        position_ids=_int64(np.concatenate(positions)),
        layout=tuple(layout),
        predictors=_int64(np.concatenate(predictors)),
        targets=_int64(np.concatenate(responses)),
        response_tokens=_int64(np.array([len(response) for response in responses])),
        keys=keys,
        weights=torch.ones(len(sequences)),
    )


def dummy_batch() -> PackedBatch:
    """The smallest batch that takes part in a forward and weighs nothing."""
    one = np.zeros(1, dtype=np.int32)
    batch = pack([Sequences(one, (one, one))], np.empty((0, 2), dtype=np.uint64))
    return replace(batch, weights=torch.zeros(1))


def _int64(array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def plan_micro_batches(sizes: PairSizes, world_size: int, token_budget: int) -> list[list[list[int]]]:
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
    tokens, costs = sizes.tokens.tolist(), sizes.costs.tolist()
    micro_batches = math.ceil(np.minimum(sizes.tokens, token_budget).sum() / (world_size * token_budget))
    while True:
        number = world_size * micro_batches
        bins = _fill_evenly(tokens, costs, number, token_budget)
        bins = bins or _fill_tightly(tokens, number, token_budget)
        if bins is not None:
            return _deal_to_ranks(bins, costs, world_size)
        micro_batches += 1


def _fill_evenly(tokens: list[int], costs: list[float], number: int, budget: int) -> list[list[int]] | None:
    """Dearest pair first into the bin of least cost (LPT); None if that has no room for a pair."""
    bins: list[list[int]] = [[] for _ in range(number)]
    loads = [0] * number
    heap = [(0.0, bin_number) for bin_number in range(number)]
    for place in sorted(range(len(costs)), key=lambda p: -costs[p]):
        cost, bin_number = heap[0]
        if loads[bin_number] and loads[bin_number] + tokens[place] > budget:
            return None
        heapq.heapreplace(heap, (cost + costs[place], bin_number))
        loads[bin_number] += tokens[place]
        bins[bin_number].append(place)
    return bins


def _fill_tightly(tokens: list[int], number: int, budget: int) -> list[list[int]] | None:
    """Best fit, into the smallest bins that a few trials find to do (Coffman, Garey, Johnson 1978)."""
    bins = _fit(tokens, number, budget)
    too_small, capacity = min(sum(tokens) // number, budget), budget
    for _ in range(_CAPACITY_TRIALS if bins else 0):
        middle = (too_small + capacity) // 2
        tighter = _fit(tokens, number, middle)
        if tighter is None:
            too_small = middle
        else:
            bins, capacity = tighter, middle
    return bins


def _fit(tokens: list[int], number: int, capacity: int) -> list[list[int]] | None:
    """Longest pair first into the fullest bin that has room for it; None if no bin has."""
    bins: list[list[int]] = [[] for _ in range(number)]
    rooms = [(capacity, bin_number) for bin_number in range(number)]
    for place in sorted(range(len(tokens)), key=lambda p: -tokens[p]):
        fitting = bisect.bisect_left(rooms, (min(tokens[place], capacity), 0))
        if fitting == number:
            return None
        room, bin_number = rooms.pop(fitting)
        bisect.insort(rooms, (max(room - tokens[place], 0), bin_number))
        bins[bin_number].append(place)
    return bins


def _deal_to_ranks(bins: list[list[int]], costs: list[float], world_size: int) -> list[list[list[int]]]:
    """Bins of similar cost share a micro-batch; there the rank that has done least gets the dearest."""
    dearest_first = sorted(((sum(costs[p] for p in content), content) for content in bins), reverse=True)
    done = [0.0] * world_size
    plan = []
    for start in range(0, len(bins), world_size):
        micro_batch: list[list[int]] = [[] for _ in range(world_size)]
        idle_first = sorted(range(world_size), key=done.__getitem__)
        for rank, (cost, content) in zip(idle_first, dearest_first[start : start + world_size], strict=True):
            done[rank] += cost
            micro_batch[rank] = content
        plan.append(micro_batch)
    return plan
