"""Fill the store with what it lacks: find missing responses, score them on all ranks, write whole shards."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_dist.data.dataset import Keys, PairDataset
from dpo_dist.data.pack import PackedBatch, dummy_batch, pack
from dpo_dist.data.plan import ComputeCosts
from dpo_dist.data.prefetch import prefetch
from dpo_dist.data.schedule import Rows
from dpo_dist.distributed.runtime import World
from dpo_dist.reference.rounds import Places, Round, Work, by_pair, in_rounds, plan_round
from dpo_dist.reference.shard import Values
from dpo_dist.reference.store import LogpStore

Scorer = Callable[[PackedBatch], Tensor]
Progress = Callable[[int, int], None]

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class FillReport:
    """What a fill did.

    Attributes:
        hits: distinct responses found stored, by other jobs since this one began as well.
        computed: distinct responses computed.
        seconds: that computing took.
        damaged: files of the store that do not hold what they promise.
    """

    hits: int = 0
    computed: int = 0
    seconds: float = 0.0
    damaged: frozenset[str] = frozenset()

    def __add__(self, other: "FillReport") -> "FillReport":
        return FillReport(
            self.hits + other.hits,
            self.computed + other.computed,
            self.seconds + other.seconds,
            self.damaged | other.damaged,
        )

    def as_dict(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "hits": self.hits,
            "computed": self.computed,
            "seconds": round(self.seconds, 3),
            "damaged": sorted(self.damaged),
        }


def missing_responses(store: LogpStore, dataset: PairDataset, rows: Rows) -> tuple[Places, int]:
    """Places in `dataset.keys` of the distinct responses of `rows` that have no valid stored row, and how
    many have one.
    """
    places = dataset.response_places(rows)
    distinct = places[first_of_each(dataset.keys[places])]
    held = store.holds(dataset.keys[distinct])
    return np.sort(distinct[~held]), int(held.sum())


def first_of_each(keys: Keys) -> Places:
    """Where each distinct key stands first, in the order of keys, in which a store is looked up fastest."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    new = np.ones(len(keys), dtype=np.bool_)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return order[new]


def fill_store(
    open_store: Callable[[Sequence[str] | None], LogpStore],
    dataset: PairDataset,
    needed: Rows,
    scorer: Callable[[], Scorer],
    world: World,
    micro_batch_tokens: int,
    costs: ComputeCosts,
    rows_per_shard: int,
    progress: Progress,
) -> FillReport:
    """Compute and store what the pairs `needed` of `dataset` need and the store lacks; collective.

    Rank 0 says what is missing, so that all ranks agree while other jobs write to the same store. Each rank
    writes the rows it computed as shards of its own, while the next ones are computed; a killed fill loses at
    most two shards of each rank. Jobs that fill one store at once visit their rounds in random orders and
    look before each one what the others have written: they share the work, and wait for nobody.

    Args:
        open_store: opens the store, at the given shards or at all there are.
        scorer: gives the reference's log-probs of a batch; called only if something is missing.
        micro_batch_tokens: that fit on a device at once, as no activations are kept.
        costs: of the model, by which ranks are loaded evenly.
        rows_per_shard: about how many rows a shard holds.
        progress: called after every round with pairs done and pairs in all.
    """
    others = _OtherJobs(open_store)
    missing, report, seed = world.on_main(lambda: (*others.survey(dataset, needed), secrets.randbits(32)))
    if not len(missing):
        return report
    started = time.monotonic()
    store = open_store([])
    world.together(store.demand_writable)
    work = by_pair(dataset, missing)
    plan = partial(plan_round, dataset, world.rank, world.size, micro_batch_tokens, costs)
    rounds = in_rounds(work, max(1, rows_per_shard // 2) * world.size, seed)
    done, computed, written = 0, 0, None
    with prefetch(map(plan, rounds), 1) as planned, ThreadPoolExecutor(1, "shards") as writer:
        score = scorer()
        for part in planned:
            left = _left(dataset, part, others, plan, world)
            if left is not None:
                keys, rows = _score(dataset, left, score, world)
                _agree_on(written, world)
                written = writer.submit(store.write, keys, rows) if rows else None
                computed += len(left.work.places)
            done += len(part.work)
            progress(done, len(work))
        _agree_on(written, world)
    return report + FillReport(len(missing) - computed, computed, time.monotonic() - started)


class _OtherJobs:
    """What other jobs store while this one fills; seen by rank 0."""

    def __init__(self, open_store: Callable[[Sequence[str] | None], LogpStore]):
        self._open_store = open_store
        self._known: set[str] = set()
        self._stores: list[LogpStore] = []

    def survey(self, dataset: PairDataset, needed: Rows) -> tuple[Places, FillReport]:
        """What is missing now, and what a fill that computes nothing would report."""
        store = self._open_store(None)
        self._known = {*store.names, *store.damaged}
        missing, hits = missing_responses(store, dataset, needed)
        damaged = frozenset([*store.foreign, *store.damaged, *store.damaged_rows])
        return missing, FillReport(hits, damaged=damaged)

    def hold(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of `keys` have a row in a shard that came after the survey; bool [n]."""
        store = self._open_store([])
        new = [name for name in store.names_now() if name not in self._known]
        if new:
            self._known.update(new)
            self._stores.append(self._open_store(new))
        held = np.zeros(len(keys), dtype=np.bool_)
        for opened in self._stores:
            held |= opened.holds(keys)
        return held


def _left(
    dataset: PairDataset, part: Round, others: _OtherJobs, plan: Callable[[Work], Round], world: World
) -> Round | None:
    """What other jobs have left of a round; None if they have stored all of it. Collective."""
    held = world.on_main(lambda: others.hold(dataset.keys[part.work.places]))
    if held.all():
        return None
    return plan(by_pair(dataset, part.work.places[~held])) if held.any() else part


def _agree_on(written: Future[str] | None, world: World) -> None:
    """Wait for the shards that are being written; an error of one rank is raised on all. Collective."""
    world.together(lambda: written.result() if written is not None else "")


def open_filled(open_store: Callable[[Sequence[str] | None], LogpStore], world: World) -> LogpStore:
    """The store as rank 0 sees it now, opened by every rank at the same shards; collective."""
    names = world.on_main(lambda: open_store(None).names)
    return world.together(lambda: open_store(names))


def _score(dataset: PairDataset, part: Round, score: Scorer, world: World) -> tuple[Keys, list[Values]]:
    """This rank's share of a round: keys uint64 [n, 2] and their rows. Collective.

    On every rank as many micro-batches (law L2).
    """
    dummies = max(world.gather(len(part.micro_batches))) - len(part.micro_batches)
    packed = _packed(dataset, part.work, part.micro_batches + [[]] * dummies, world.device)
    keys: list[Keys] = [np.empty((0, 2), dtype=np.uint64)]
    rows: list[Values] = []
    last: _ScoredBatch | None = None
    with prefetch(packed, _BATCHES_AHEAD) as batches:
        for batch in batches:
            scored = _ScoredBatch.of(batch, score(batch.to(world.device)))
            keys.append(batch.keys)
            # Read one batch late: the device has the next one to compute while this one's values arrive.
            rows += last.rows() if last is not None else []
            last = scored
    rows += last.rows() if last is not None else []
    return np.concatenate(keys), rows


def _packed(
    dataset: PairDataset, work: Work, micro_batches: Iterable[list[int]], device: torch.device
) -> Iterator[PackedBatch]:
    for numbers in micro_batches:
        batch = _pack([work.part(number, number + 1) for number in numbers], dataset)
        yield batch.pinned() if device.type == "cuda" else batch


def _pack(pairs: Sequence[Work], dataset: PairDataset) -> PackedBatch:
    """A micro-batch of these works of one pair each."""
    if not pairs:
        return dummy_batch()
    sequences = [dataset.sequences(int(pair.rows[0]), pair.which.tolist()) for pair in pairs]
    return pack(sequences, dataset.keys[np.concatenate([pair.places for pair in pairs])])


@dataclass(frozen=True)
class _ScoredBatch:
    """A micro-batch and its log-probs, which may still be on their way to the host until `arrived`."""

    batch: PackedBatch
    logps: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, batch: PackedBatch, logps: Tensor) -> "_ScoredBatch":
        """Start the copy; the host does not wait for the device."""
        if logps.device.type != "cuda":
            return cls(batch, logps, None)
        on_host = torch.empty(logps.shape, dtype=logps.dtype, pin_memory=True)
        on_host.copy_(logps, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(batch, on_host, arrived)

    def rows(self) -> list[Values]:
        """The values of each response; none of a dummy."""
        if not len(self.batch.keys):
            return []
        if self.arrived is not None:
            self.arrived.synchronize()
        ends = np.cumsum(self.batch.response_tokens.numpy())
        return np.split(self.logps.numpy(), ends[:-1])
