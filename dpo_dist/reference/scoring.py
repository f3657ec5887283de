"""Split the responses to score into rounds, each round across ranks, and score this rank's share."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpo_dist.batching.pack import RESPONSES_OF_DUMMY, PackedBatch, dummy_batch, pack
from dpo_dist.batching.plan import ComputeCosts, plan_micro_batches
from dpo_dist.batching.sampler import Indices
from dpo_dist.data.collate import damaged_ids, has_keys
from dpo_dist.data.dataset import Keys, PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import Engine, PolicyEngine
from dpo_dist.foundation.process import prefetch
from dpo_dist.reference.store import LogpStore, Values

Scorer = Callable[[PackedBatch], Tensor]
"""Per-token log-probs of a batch by the reference model: float32 [targets]."""

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Part:
    """A pair, and those of its responses to score: indices in the dataset's `keys`, and in the pair."""

    pair: int
    responses: Indices
    which: Indices


@dataclass(frozen=True)
class Round:
    """Pairs that all ranks score before they write, and one rank's micro-batches of them."""

    pairs: int
    micro_batches: list[list[Part]]

    @property
    def responses(self) -> list[int]:
        """Number of responses of each micro-batch."""
        return [sum(len(part.responses) for part in parts) for parts in self.micro_batches]


def split_into_rounds(dataset: PreferenceDataset, responses: Indices, pairs: int) -> list[Indices]:
    """Split `responses`, ascending indices in `dataset.keys`, into those of `pairs` pairs each."""
    _, firsts = np.unique(dataset.locate_responses(responses)[0], return_index=True)
    return np.split(responses, firsts[pairs::pairs])


def plan_round(
    dataset: PreferenceDataset, world: World, micro_batch_tokens: int, costs: ComputeCosts, responses: Indices
) -> Round:
    """Assign the pairs of a round to this rank's micro-batches; not collective.

    A round has thousands of pairs per rank: dealt out in order of cost, ranks get nearly equal shares, and
    each rank plans only its own.
    """
    owners, which = dataset.locate_responses(responses)
    pairs, firsts, counts = np.unique(owners, return_index=True, return_counts=True)
    sizes = dataset.sizes(pairs, responses, counts, costs)
    mine = np.argsort(-sizes.costs, kind="stable")[world.replica :: world.replicas]

    def part(number: int) -> Part:
        own = slice(firsts[number], firsts[number] + counts[number])
        return Part(int(pairs[number]), responses[own], which[own])

    plan = plan_micro_batches(sizes.at(mine), 1, micro_batch_tokens)
    return Round(len(pairs), [[part(number) for number in mine[numbers]] for (numbers,) in plan])


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
    dummies: list[list[Part]] = [[]] * (len(forwards) - len(round_.micro_batches))
    for parts, most in zip(round_.micro_batches + dummies, forwards, strict=True):
        sequences = [dataset.sequences(part.pair, part.which.tolist()) for part in parts]
        keys = dataset.keys[np.concatenate([np.empty(0, np.int64), *(part.responses for part in parts)])]
        is_whole = has_keys(sequences, keys)
        if not is_whole:
            damaged += [part.pair for part in parts]
        batch = pack(sequences, keys) if parts and is_whole else dummy_batch()
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


@dataclass(frozen=True)
class ReferenceProvider:
    """Per-token reference log-probs of a micro-batch, from one of these, or none (`reference.mode=none`).

    Attributes:
        engine: a model beside the policy (`live`).
        policy: computes them with its adapter switched off (`adapter`).
        store: has the entries of all batches, looked up by content (`cached`).
    """

    engine: Engine | None = None
    policy: PolicyEngine | None = None
    store: LogpStore | None = None

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Attach the store's log-probs, on the host; a dummy batch gets zeros; thread-safe."""
        if self.store is None:
            return batch
        if not len(batch.keys):
            return replace(batch, reference_logps=torch.zeros(len(batch.targets)))
        values = np.concatenate(self.store.read(batch.keys))
        scored = values if batch.mask is None else values[batch.mask]
        return replace(batch, reference_logps=torch.from_numpy(scored))

    def token_logps(self, batch: PackedBatch) -> Tensor | None:
        """Return float32 [targets] on the device of a batch that `attach` returned; None in mode `none`.

        Collective where a model computes them.
        """
        if self.engine is not None:
            return self.engine.token_logps(batch)
        if self.policy is not None:
            return self.policy.base_token_logps(batch)
        return batch.reference_logps
