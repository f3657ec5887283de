"""Fill the store with what it lacks: find missing responses, score them on all ranks, write whole shards."""

import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.atomic import collect_abandoned
from dpo_dist.data.dataset import Keys, PreferenceDataset
from dpo_dist.data.micro_batches import ComputeCosts
from dpo_dist.data.sampler import Indices
from dpo_dist.distributed.world import World
from dpo_dist.errors import ReferenceModelError
from dpo_dist.prefetch import prefetch
from dpo_dist.reference.fill_rounds import Places, Round, Work, by_pair, in_rounds, plan_round
from dpo_dist.reference.scoring import Scorer, score_round
from dpo_dist.reference.shard import Values
from dpo_dist.reference.store import LogpStore

OpenStore = Callable[[Sequence[str] | None], LogpStore]
Progress = Callable[[int, int], None]

PATIENCE_SECONDS = 90
"""How long another node's shard may stay unseen. Clients of NFS look anew after 60 seconds at most."""

_RETRY_SECONDS = 1.0
_KEYS_AT_ONCE = 2**20


@dataclass(frozen=True)
class FillReport:
    """What a fill did.

    Attributes:
        hits: distinct responses found stored, by other jobs since this one began as well.
        computed: distinct responses computed.
        seconds: that computing took.
        damaged: files of the store that do not hold what they promise.
        shards: size in bytes of every shard that has what the fill found or wrote, by its name; the same on
            every rank.
    """

    hits: int = 0
    computed: int = 0
    seconds: float = 0.0
    damaged: frozenset[str] = frozenset()
    shards: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __add__(self, other: "FillReport") -> "FillReport":
        return FillReport(
            self.hits + other.hits,
            self.computed + other.computed,
            self.seconds + other.seconds,
            self.damaged | other.damaged,
            {**self.shards, **other.shards},
        )

    def as_dict(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "hits": self.hits,
            "computed": self.computed,
            "seconds": round(self.seconds, 3),
            "damaged": sorted(self.damaged),
        }


def missing_responses(store: LogpStore, dataset: PreferenceDataset, rows: Indices) -> tuple[Places, int]:
    """Places in `dataset.keys` of the distinct responses of `rows` that have no valid stored row, and how
    many have one.
    """
    places = dataset.response_indices(rows)
    distinct = places[first_of_each(dataset.keys[places])]
    held = store.contains(dataset.keys[distinct])
    return np.sort(distinct[~held]), int(held.sum())


def first_of_each(keys: Keys) -> Places:
    """Where each distinct key stands first, in the order of keys, in which a store is looked up fastest."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    new = np.ones(len(keys), dtype=np.bool_)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return order[new]


def fill_store(
    open_store: OpenStore,
    dataset: PreferenceDataset,
    needed: Indices,
    scorer: Callable[[], Scorer],
    world: World,
    micro_batch_tokens: int,
    costs: ComputeCosts,
    rows_per_shard: int,
    progress: Progress,
    known: Mapping[str, int] | None = None,
) -> FillReport:
    """Compute and store what the pairs `needed` of `dataset` need and the store lacks; collective.

    Rank 0 says what is missing, so that all ranks agree while other jobs write to the same store. Each rank
    writes the rows it computed as shards of its own, while the next ones are computed; a killed fill loses at
    most two shards of each rank. Jobs that fill one store at once visit their rounds in random orders and
    look before each one what the others have written: they share the work, and wait for nobody. What killed
    fills have left half-written is removed.

    Args:
        open_store: opens the store, at the given shards or at all there are.
        scorer: gives the reference's log-probs of a batch; called only if something is missing.
        micro_batch_tokens: that fit on a device at once, as no activations are kept.
        costs: of the model, by which ranks are loaded evenly.
        rows_per_shard: about how many rows a shard holds.
        progress: called with pairs done and pairs in all: at the start, and as micro-batches are scored.
        known: `FillReport.shards` of an earlier fill of this run, which a listing may not show yet.

    Raises:
        ReferenceModelError: the store cannot be written, or a log-prob is not finite.
        DataError: token ids are not those of the key that they would be stored under.
    """
    others = _OtherJobs(open_store, known or {})
    missing, report, seed = world.on_main(lambda: (*others.survey(dataset, needed), secrets.randbits(32)))
    if not len(missing):
        return report
    started = time.monotonic()
    store = open_store([])
    world.together(store.check_writable)
    world.on_main(lambda: collect_abandoned(store.folder))
    work = by_pair(dataset, missing)
    plan = partial(plan_round, dataset, world.rank, world.size, micro_batch_tokens, costs)
    rounds = in_rounds(work, max(1, rows_per_shard // 2) * world.size, seed)
    done, computed, written, shards = 0, 0, None, dict[str, int]()
    progress(0, len(work))
    with prefetch(map(plan, rounds), 1) as planned, ThreadPoolExecutor(1, "shards") as writer:
        score = scorer()
        for part in planned:
            left = _left(dataset, part, others, plan, world)
            if left is not None:
                told = partial(_tell_within, progress, done, len(part.work), len(work))
                keys, rows = score_round(dataset, left, score, world, told)
                shards |= _agree_on(written, world)
                written = writer.submit(_write, store, keys, rows) if rows else None
                computed += len(left.work.places)
            done += len(part.work)
            progress(done, len(work))
        shards |= _agree_on(written, world)
    seconds = time.monotonic() - started
    used = world.on_main(lambda: others.shards)
    for written_by_rank in world.gather(shards):
        used |= written_by_rank
    return report + FillReport(len(missing) - computed, computed, seconds, shards=used)


def _tell_within(progress: Progress, done: int, pairs: int, total: int, share: float) -> None:
    """Report a part of a round; ranks have equal shares of it."""
    progress(done + int(share * pairs), total)


def _write(store: LogpStore, keys: Keys, rows: list[Values]) -> dict[str, int]:
    """Write a shard; its name and size."""
    name = store.write(keys, rows)
    return {name: (store.root / name).stat().st_size}


class _OtherJobs:
    """What other jobs store while this one fills; seen by rank 0.

    Attributes:
        shards: size of each shard in which something was found.
    """

    def __init__(self, open_store: OpenStore, known: Mapping[str, int]):
        self._open_store = open_store
        self._seen: set[str] = set()
        self._stores: list[LogpStore] = []
        self._known = known
        self.shards: dict[str, int] = {}

    def survey(self, dataset: PreferenceDataset, needed: Indices) -> tuple[Places, FillReport]:
        """What is missing now, and what a fill that computes nothing would report."""
        listed = self._open_store(None)
        shards = {**listed.shard_bytes, **self._known}
        store = listed if shards == listed.shard_bytes else open_shards(self._open_store, shards)
        self._seen = {*shards, *listed.damaged}
        self.shards = shards
        missing, hits = missing_responses(store, dataset, needed)
        damaged = frozenset([*listed.foreign, *listed.damaged, *store.damaged_rows])
        return missing, FillReport(hits, damaged=damaged, shards=shards)

    def hold(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of `keys` have a row in a shard that came after the survey; bool [n]."""
        store = self._open_store([])
        new = [name for name in store.list_now() if name not in self._seen]
        if new:
            self._seen.update(new)
            self._stores.append(self._open_store(new))
            self.shards |= self._stores[-1].shard_bytes
        held = np.zeros(len(keys), dtype=np.bool_)
        for opened in self._stores:
            held |= opened.contains(keys)
        return held


def _left(
    dataset: PreferenceDataset, part: Round, others: _OtherJobs, plan: Callable[[Work], Round], world: World
) -> Round | None:
    """What other jobs have left of a round; None if they have stored all of it. Collective."""
    held = world.on_main(lambda: others.hold(dataset.keys[part.work.places]))
    if held.all():
        return None
    return plan(part.work.where(~held)) if held.any() else part


def _agree_on(written: Future[dict[str, int]] | None, world: World) -> dict[str, int]:
    """Wait for the shards that are being written; an error of one rank is raised on all. Collective.

    Returns:
        Name and size of this rank's shard, if it wrote one.
    """
    return world.together(lambda: written.result() if written is not None else {})


def open_filled(open_store: OpenStore, shards: Mapping[str, int], world: World) -> LogpStore:
    """Open the same shards on every rank: those that ranks say they found or wrote; collective.

    Args:
        open_store: as in `fill_store`.
        shards: `FillReport.shards`. A listing is not asked: on a network file system it may lack files that
            another node has just written.

    Raises:
        ReferenceModelError: a rank does not get to see a shard.
    """
    return world.together(lambda: open_shards(open_store, shards))


def open_shards(open_store: OpenStore, shards: Mapping[str, int]) -> LogpStore:
    """Open the store at `shards`, waiting a little for those that this node does not see whole yet.

    Raises:
        ReferenceModelError: one does not appear, or not with its size.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    order = [space.name for space in open_store([]).spaces]
    names = sorted(shards, key=lambda name: (order.index(name.split("/")[0]), name))
    while True:
        store = open_store(names)
        unseen = sorted(name for name, size in shards.items() if store.shard_bytes.get(name) != size)
        if not unseen:
            return store
        if time.monotonic() > deadline:
            raise ReferenceModelError(
                "shards of reference log-probs that this run uses cannot be read",
                where=f"reference.store on {socket.gethostname()}",
                got=f"{len(unseen)} of {len(shards)} missing or damaged: {store.root / unseen[0]}",
                expected=f"to see them within {PATIENCE_SECONDS} seconds of their writing",
                remedy="put reference.store on a file system that every node sees, and start again; what is "
                "missing is computed before training",
            )
        time.sleep(_RETRY_SECONDS)
        store.list_now()  # a client of a network file system that lists a folder looks for its new files


def check_complete(store: LogpStore, dataset: PreferenceDataset, rows: Indices, world: World) -> None:
    """Check on every rank, before training, that the store has a row for all that `rows` need; collective.

    Reads no values: rank 0 has verified those that were stored, and each is verified again when it is used.

    Raises:
        ReferenceModelError: a rank lacks some of it.
    """

    def check() -> None:
        places = dataset.response_indices(rows)
        parts = np.split(places, range(_KEYS_AT_ONCE, len(places), _KEYS_AT_ONCE))
        missing = sum(int((~store.indexed(dataset.keys[part])).sum()) for part in parts)
        if missing:
            raise ReferenceModelError(
                "the reference store lacks log-probs right after it was filled",
                where=f"{store.folder} on rank {world.rank} ({socket.gethostname()})",
                got=f"{missing:,} of {len(places):,} responses have none",
                remedy="check that every node sees the same folder and that nothing changes files in it, and "
                "start the same command again: what is missing is computed before training",
            )

    world.together(check)
