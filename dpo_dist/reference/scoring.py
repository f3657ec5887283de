"""Split the responses to score into rounds, each round across ranks, and score this rank's share."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dpo_dist.batching.pack import RESPONSES_OF_DUMMY, PackedBatch, dummy_batch, pack
from dpo_dist.batching.plan import ComputeCosts, plan_micro_batches
from dpo_dist.batching.sampler import Indices
from dpo_dist.data.collate import damaged_ids, has_keys
from dpo_dist.data.dataset import Keys, PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.process import prefetch
from dpo_dist.reference.engine import ReferenceEngine
from dpo_dist.reference.store import LogpStore, Values

Scorer = Callable[[PackedBatch], Tensor]
"""Per-token log-probs of a batch by the reference model: float32 [targets]."""

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Work:
    """Responses to score, grouped by pair; arrays, because they may be many millions.

    Attributes:
        pairs: int64 [pairs], indices in the dataset, ascending.
        stops: int64 [pairs], end offset of each pair's responses in `responses`.
        responses: int64 [responses], indices in the dataset's `keys`.
        which: int64 [responses], number of each response within its pair.
    """

    pairs: Indices
    stops: Indices
    responses: Indices
    which: Indices

    @classmethod
    def of(cls, dataset: PreferenceDataset, responses: Indices) -> "Work":
        """Group `responses`, ascending indices in `dataset.keys`, by pair."""
        pairs, which = dataset.locate_responses(responses)
        distinct, counts = np.unique(pairs, return_counts=True)
        return cls(distinct, np.cumsum(counts), responses, which)

    def __len__(self) -> int:
        return len(self.pairs)

    def part(self, start: int, stop: int) -> "Work":
        """Return the pairs ``start <= number < stop``."""
        first = int(self.stops[start - 1]) if start else 0
        pairs, stops = self.pairs[start:stop], self.stops[start:stop] - first
        responses = slice(first, first + int(stops[-1]))
        return Work(pairs, stops, self.responses[responses], self.which[responses])

    def rounds(self, pairs: int) -> Iterator["Work"]:
        """Split into rounds of `pairs` pairs."""
        for start in range(0, len(self), pairs):
            yield self.part(start, min(start + pairs, len(self)))


@dataclass(frozen=True)
class Round:
    """Work that all ranks score before they write, and one rank's micro-batches of it: numbers of pairs."""

    work: Work
    micro_batches: list[list[int]]

    @property
    def responses(self) -> list[int]:
        """Number of responses of each micro-batch."""
        counts = np.diff(self.work.stops, prepend=0)
        return [int(counts[numbers].sum()) for numbers in self.micro_batches]


def plan_round(
    dataset: PreferenceDataset, world: World, micro_batch_tokens: int, costs: ComputeCosts, work: Work
) -> Round:
    """Assign pairs of a round to this rank's micro-batches; not collective.

    A round has thousands of pairs per rank: dealt out in order of cost, ranks get nearly equal shares, and
    each rank plans only its own.
    """
    sizes = dataset.sizes(work.pairs, work.responses, np.diff(work.stops, prepend=0), costs)
    mine = np.argsort(-sizes.costs, kind="stable")[world.replica :: world.replicas]
    plan = plan_micro_batches(sizes.at(mine), 1, micro_batch_tokens)
    return Round(work, [mine[numbers].tolist() for (numbers,) in plan])


def score_round(
    dataset: PreferenceDataset,
    round_: Round,
    score: Scorer,
    world: World,
    progress: Callable[[float], None],
    must_stop: Callable[[], bool],
) -> tuple[Keys, list[Values], bool]:
    """Score this rank's micro-batches, the same number on every rank (law L2). Collective.

    Args:
        progress: called with the share of the round that is done.
        must_stop: collective; asked after each micro-batch whether to end without the others.

    Returns:
        Keys uint64 [n, 2] and log-probs of this rank's responses, none if it does not lead its replica; and
        whether the round was ended.
    """
    columns = itertools.zip_longest(*world.gather(round_.responses), fillvalue=0)
    forwards = [max(RESPONSES_OF_DUMMY, *column) for column in columns]
    damaged: list[int] = []
    packed = _packed(dataset, round_, forwards, damaged, world.device)
    keys: list[Keys] = [np.empty((0, 2), dtype=np.uint64)]
    entries: list[Values] = []
    last: _ScoredBatch | None = None
    is_stopped = False
    with prefetch(packed, _BATCHES_AHEAD) as batches:
        for number, batch in enumerate(batches, start=1):
            logps = score(batch.to(world.device))
            if world.leads:
                keys.append(batch.keys)
                # Read one batch late: the device computes the next one while this one's values are copied.
                entries += last.entries() if last is not None else []
                last = _ScoredBatch.of(batch, logps)
            progress(number / len(forwards))
            if is_stopped := must_stop():
                break
    entries += last.entries() if last is not None else []

    def check() -> None:
        if damaged:
            raise damaged_ids(dataset, damaged)

    world.together(check)
    return np.concatenate(keys), entries, is_stopped


def _packed(
    dataset: PreferenceDataset,
    round_: Round,
    forwards: Sequence[int],
    damaged: list[int],
    device: torch.device,
) -> Iterator[PackedBatch]:
    """Pack as many micro-batches as `forwards` has numbers of responses; dummies where this rank has fewer.

    If token ids do not match the keys, the pairs are added to `damaged` and a dummy is used: until the end of
    the round all ranks score the same number of batches.
    """
    dummies: list[list[int]] = [[]] * (len(forwards) - len(round_.micro_batches))
    for numbers, most in zip(round_.micro_batches + dummies, forwards, strict=True):
        parts = [round_.work.part(number, number + 1) for number in numbers]
        sequences = [dataset.sequences(int(part.pairs[0]), part.which.tolist()) for part in parts]
        keys = dataset.keys[np.concatenate([np.empty(0, np.int64), *(part.responses for part in parts)])]
        is_whole = has_keys(sequences, keys)
        if not is_whole:
            damaged += [int(round_.work.pairs[number]) for number in numbers]
        batch = pack(sequences, keys) if numbers and is_whole else dummy_batch()
        batch = replace(batch, forwards=most)
        yield batch.pinned() if device.type == "cuda" else batch


@dataclass(frozen=True)
class _ScoredBatch:
    """A micro-batch and its log-probs on the host, complete once `arrived` is reached."""

    batch: PackedBatch
    logps: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, batch: PackedBatch, logps: Tensor) -> "_ScoredBatch":
        """Start the copy to the host without waiting for the device."""
        if logps.device.type != "cuda":
            return cls(batch, logps, None)
        on_host = torch.empty(logps.shape, dtype=logps.dtype, pin_memory=True)
        on_host.copy_(logps, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(batch, on_host, arrived)

    def entries(self) -> list[Values]:
        """Return the log-probs of each response; an empty list for a dummy."""
        if not len(self.batch.keys):
            return []
        if self.arrived is not None:
            self.arrived.synchronize()
        ends = np.cumsum(self.batch.response_tokens.numpy())
        return np.split(self.logps.numpy(), ends[:-1])


class ReferenceProvider(Protocol):
    """Per-token reference log-probs of a micro-batch."""

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Attach log-probs that need no forward pass, on the host; thread-safe. By default there are none."""
        return batch

    def token_logps(self, batch: PackedBatch) -> Tensor | None:
        """Return float32 [targets] on the device of a batch that `attach` returned; None in mode `none`.

        Collective where a model computes them.
        """
        ...


class NoReference(ReferenceProvider):
    """`reference.mode=none`."""

    def token_logps(self, _batch: PackedBatch) -> None:
        """Return None."""


@dataclass(frozen=True)
class LiveReference(ReferenceProvider):
    """`reference.mode=live`: an engine beside the policy."""

    engine: ReferenceEngine

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Score the batch with the reference."""
        return self.engine.token_logps(batch)


@dataclass(frozen=True)
class AdapterReference(ReferenceProvider):
    """`reference.mode=adapter`: the policy with its adapter switched off."""

    policy: PolicyEngine

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Score the batch with the policy's base."""
        return self.policy.base_token_logps(batch)


@dataclass(frozen=True)
class StoredReference(ReferenceProvider):
    """`reference.mode=cached`: entries of the store, looked up by content."""

    store: LogpStore

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Look up the batch's entries, which are of whole responses; a dummy batch gets zeros."""
        if not len(batch.keys):
            return replace(batch, reference_logps=torch.zeros(len(batch.targets)))
        values = np.concatenate(self.store.read(batch.keys))
        scored = values if batch.mask is None else values[batch.mask]
        return replace(batch, reference_logps=torch.from_numpy(scored))

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Return the log-probs that `attach` looked up."""
        assert batch.reference_logps is not None, "the batch did not go through attach"
        return batch.reference_logps
