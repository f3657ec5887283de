"""Fill the store on all ranks: find missing responses, score them, write whole shards."""

import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.plan import ComputeCosts
from dpo_dist.batching.sampler import Indices
from dpo_dist.data.dataset import Keys, PreferenceDataset
from dpo_dist.distributed.world import Stops, World
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.foundation.files import collect_abandoned
from dpo_dist.foundation.process import note_progress, prefetch, stopped_by
from dpo_dist.model.numerics import TOLERABLE_FIELDS
from dpo_dist.reference.fingerprint import ReferenceFingerprint, read_fingerprint
from dpo_dist.reference.maintenance import fingerprint_folders
from dpo_dist.reference.scoring import Round, Scorer, Work, plan_round, score_round
from dpo_dist.reference.shard import Values
from dpo_dist.reference.store import LogpStore

Progress = Callable[[int, int], None]

_KEYS_AT_ONCE = 2**20


@dataclass(frozen=True)
class FillReport:
    """Cache hits and computed log-probs of a fill.

    Attributes:
        hits: distinct responses found in the store, also those that other jobs stored during the fill.
        computed: distinct responses computed.
        seconds: spent computing.
        damaged: shards with damage, and files in the store that are not shards.
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
        """Return the fields of summary.json."""
        return {
            "hits": self.hits,
            "computed": self.computed,
            "seconds": round(self.seconds, 3),
            "damaged": sorted(self.damaged),
        }


@dataclass
class StoreFiller:
    """Computes and stores the missing log-probs of a run; all methods are collective.

    Attributes:
        store: the store to fill; its own view may be empty.
        load_scorer: loads the reference; called only if log-probs are missing.
        micro_batch_tokens: that fit on a device at once, without activations.
        costs: of the model, to balance ranks; `load_scorer` may set them.
        entries_per_shard: approximate number of entries in a shard.
        stops: asked after each micro-batch; None: nobody stops the fill.
        shards: size in bytes of every shard with an entry that the run uses, by name; equal on all ranks. A
            listing is not enough: on a network file system it may lack files that another node just wrote.
    """

    store: LogpStore
    load_scorer: Callable[[], Scorer]
    world: World
    micro_batch_tokens: int
    costs: ComputeCosts
    entries_per_shard: int
    stops: Stops | None = None
    shards: Mapping[str, int] = field(default_factory=dict)

    def fill(self, dataset: PreferenceDataset, indices: Indices, progress: Progress) -> FillReport:
        """Compute and store the missing log-probs of the pairs `indices` of `dataset`.

        Rank 0 decides what is missing, so that all ranks agree while other jobs write to the same store. A
        killed fill loses at most two shards of each rank. Jobs that fill one store at the same time share
        the work without waiting for each other: they visit their rounds in random orders and skip what
        others have stored. Files left half-written by killed fills are deleted.

        Args:
            progress: called with pairs done and pairs in all: at the start, and after each micro-batch.

        Raises:
            ReferenceModelError: the store cannot be written, or a log-prob is not finite.
            DataError: token ids do not match the key that they would be stored under.
            StoppedError: a rank was asked to stop; what is scored is stored.
        """
        others = _OtherJobs(self.store, self.shards)
        missing, report, seed = self.world.on_main(
            lambda: (*others.survey(dataset, indices), secrets.randbits(32))
        )
        written: dict[str, int] = {}
        if len(missing):
            started = time.monotonic()
            self.world.together(self.store.check_writable)
            self.world.on_main(lambda: collect_abandoned(self.store.folder))
            work = Work.of(dataset, missing)
            computed, written = self._score_and_write(dataset, work, seed, others, progress)
            report += FillReport(len(missing) - computed, computed, time.monotonic() - started)
        self.shards = self.world.on_main(lambda: others.shards)
        for of_rank in self.world.gather(written):
            self.shards = {**self.shards, **of_rank}
        return report

    def open_filled(self) -> LogpStore:
        """Open the same shards on every rank: all that the fills found or wrote.

        Raises:
            ReferenceModelError: a shard does not become visible on some rank.
        """
        return self.world.together(lambda: self.store.wait_for(self.shards))

    def _score_and_write(
        self, dataset: PreferenceDataset, work: Work, seed: int, others: "_OtherJobs", progress: Progress
    ) -> tuple[int, dict[str, int]]:
        """Return the number of responses computed by all ranks, and the shards of this rank."""
        done, computed, own = 0, 0, 0
        must_stop = _Once(self.stops)
        score = self.load_scorer()
        plan = partial(plan_round, dataset, self.world, self.micro_batch_tokens, self.costs)
        rounds = work.rounds(max(1, self.entries_per_shard // 2) * self.world.replicas, seed)
        progress(0, len(work))
        with prefetch(map(plan, rounds), 1) as planned, ThreadPoolExecutor(1, "shards") as pool:
            writer = _ShardWriter(self.store, self.world, pool)
            for round_ in planned:
                left = self._not_stored_by(others, dataset, round_, plan)
                if left is not None:
                    within = partial(_progress_within, progress, done, len(round_.work), len(work))
                    keys, entries = score_round(dataset, left, score, self.world, within, must_stop)
                    writer.write(keys, entries)
                    own += len(keys)
                    computed += len(left.work.responses)
                if must_stop.is_true:
                    break
                done += len(round_.work)
                progress(done, len(work))
            written = writer.finish()
        if must_stop.is_true and self.stops is not None:
            stored, wanted = sum(self.world.gather(own)), len(work.responses)
            when = f"after {stored:,} of the {wanted:,} missing reference log-probs were stored"
            raise stopped_by(self.stops.reasons(), when)
        return computed, written

    def _not_stored_by(
        self, others: "_OtherJobs", dataset: PreferenceDataset, round_: Round, plan: Callable[[Work], Round]
    ) -> Round | None:
        """Return the part of a round that no other job has stored meanwhile; None if nothing is left."""
        stored = self.world.on_main(lambda: others.contain(dataset.keys[round_.work.responses]))
        if stored.all():
            return None
        return plan(round_.work.select(~stored)) if stored.any() else round_


class _Once:
    """Whether a rank was asked to stop; collective until it is true."""

    def __init__(self, stops: Stops | None):
        self._stops = stops
        self.is_true = False

    def __call__(self) -> bool:
        """Ask all ranks."""
        self.is_true = self._stops is not None and self._stops.must_stop()
        return self.is_true


def _progress_within(progress: Progress, done: int, pairs: int, total: int, share: float) -> None:
    """Report a share of a round; ranks have equal parts of it."""
    progress(done + int(share * pairs), total)


class _ShardWriter:
    """Writes one shard at a time on a thread, while the next one is scored; methods are collective."""

    def __init__(self, store: LogpStore, world: World, pool: ThreadPoolExecutor):
        self._store, self._world, self._pool = store, world, pool
        self._pending: Future[dict[str, int]] | None = None
        self._shards: dict[str, int] = {}

    def write(self, keys: Keys, entries: list[Values]) -> None:
        """Start to write this rank's shard, if it has entries, after the one before is complete."""
        self.finish()
        if entries:
            self._pending = self._pool.submit(self._write, keys, entries)

    def finish(self) -> dict[str, int]:
        """Wait for the pending shard and return size by name of all; one rank's error is raised on all."""
        pending, self._pending = self._pending, None
        self._shards |= self._world.together(lambda: pending.result() if pending is not None else {})
        return self._shards

    def _write(self, keys: Keys, entries: list[Values]) -> dict[str, int]:
        name = self._store.write(keys, entries)
        note_progress(name)
        return {name: (self._store.root / name).stat().st_size}


class _OtherJobs:
    """Shards that other jobs write during a fill; used on rank 0 only.

    Attributes:
        shards: size in bytes of each shard that has been opened, by name.
    """

    def __init__(self, store: LogpStore, known: Mapping[str, int]):
        self._store = store
        self._known = known
        self._seen: set[str] = set()
        self._opened: list[LogpStore] = []
        self.shards: dict[str, int] = {}

    def survey(self, dataset: PreferenceDataset, indices: Indices) -> tuple[Indices, FillReport]:
        """Return the responses that are missing now, and the report of a fill that computes nothing."""
        listed = self._store.reopen()
        self.shards = {**listed.shards, **self._known}
        store = listed if self.shards == listed.shards else self._store.wait_for(self.shards)
        self._seen = {*self.shards, *listed.damaged}
        missing, hits = missing_responses(store, dataset, indices)
        damaged = frozenset([*listed.foreign, *listed.damaged, *store.damaged_entries])
        return missing, FillReport(hits, damaged=damaged)

    def contain(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which `keys` have an intact entry in a shard newer than the survey; bool [n]."""
        new = [name for name in self._store.list_now() if name not in self._seen]
        if new:
            self._seen.update(new)
            self._opened.append(self._store.reopen(new))
            self.shards |= self._opened[-1].shards
        stored = np.zeros(len(keys), dtype=np.bool_)
        for store in self._opened:
            stored |= store.contains(keys)
        return stored


def missing_responses(store: LogpStore, dataset: PreferenceDataset, indices: Indices) -> tuple[Indices, int]:
    """Return the distinct responses of the pairs `indices` without an intact entry, and how many have one.

    Returns:
        int64 [missing], ascending indices in `dataset.keys`; number of distinct responses with an entry.
    """
    responses = dataset.response_indices(indices)
    distinct = responses[first_of_each(dataset.keys[responses])]
    stored = store.contains(dataset.keys[distinct])
    return np.sort(distinct[~stored]), int(stored.sum())


def first_of_each(keys: Keys) -> Indices:
    """Return the index of the first occurrence of each distinct key, in the order of keys (fast look-up)."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    new = np.ones(len(keys), dtype=np.bool_)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return order[new]


def check_complete(store: LogpStore, dataset: PreferenceDataset, indices: Indices, world: World) -> None:
    """Check on every rank, before training, that the store has all entries of the pairs; collective.

    Reads no values: rank 0 has verified those that were stored before, and each is verified again when read.

    Raises:
        ReferenceModelError: an entry is missing on some rank.
    """

    def check() -> None:
        responses = dataset.response_indices(indices)
        parts = np.split(responses, range(_KEYS_AT_ONCE, len(responses), _KEYS_AT_ONCE))
        missing = sum(int((~store.has_keys(dataset.keys[part])).sum()) for part in parts)
        if missing:
            raise ReferenceModelError(
                "the reference store lacks log-probs right after it was filled",
                where=f"{store.folder} on rank {world.rank} ({socket.gethostname()})",
                got=f"{missing:,} of {len(responses):,} responses have none",
                remedy="check that every node sees the same folder and that nothing changes files in it, and "
                "start the same command again: missing log-probs are computed before training",
            )

    world.together(check)


Profile = dict[str, str]
OWN_NUMERICS = "own"

Visited = Sequence[tuple[PreferenceDataset, Indices]]
"""Datasets, each with the indices of the pairs that a run uses."""


def agree_on_numerics(profile: Profile, is_tolerant: bool, world: World) -> Profile:
    """Return the one numerics profile under which all ranks store log-probs; collective.

    Args:
        profile: of this rank.
        is_tolerant: whether ranks may differ in `TOLERABLE_FIELDS`. The profile then lists all their values,
            because a reader of an entry does not know which rank computed it.

    Raises:
        ReferenceModelError: ranks differ in a field that they may not differ in.
    """
    profiles = world.gather(profile)
    names = sorted({name for each in profiles for name in each})
    found = {name: sorted({each.get(name, "-") for each in profiles}) for name in names}
    differing = {name for name, values in found.items() if len(values) > 1}
    if differing and not (is_tolerant and differing <= TOLERABLE_FIELDS):
        raise ReferenceModelError(
            "the processes of this run compute log-probs with different numerics",
            where=f"ranks of {world.size}",
            got="; ".join(f"{name}: {_by_ranks(name, profiles, world)}" for name in sorted(differing)),
            expected="one numerics profile on all ranks: stored log-probs are addressed by it",
            remedy="run on nodes of one kind with one installation"
            + ("; or set reference.numerics=tolerant" if differing <= TOLERABLE_FIELDS else ""),
        )
    return {name: " or ".join(values) for name, values in found.items()}


def _by_ranks(name: str, profiles: list[Profile], world: World) -> str:
    """Return the values of one field, each with its ranks: "AVX2 on rank 1 (host b), ..."."""
    ranks: dict[str, list[int]] = {}
    for rank, profile in enumerate(profiles):
        ranks.setdefault(profile.get(name, "-"), []).append(rank)
    hosts = {peer.rank: peer.host for peer in world.peers}
    return ", ".join(
        f"{value} on rank {', '.join(map(str, of_value))} "
        f"({', '.join(sorted({hosts.get(rank, '-') for rank in of_value}))})"
        for value, of_value in ranks.items()
    )


def find_compatible(root: Path, own: ReferenceFingerprint) -> list[ReferenceFingerprint]:
    """Return the fingerprints in the store `root` that a tolerant run may use, most similar first."""
    if not root.is_dir():
        return []
    found = [read_fingerprint(folder) for folder in fingerprint_folders(root)]
    compatible = [
        other
        for other in found
        if other is not None
        and other.reference == own.reference
        and other != own
        and TOLERABLE_FIELDS.issuperset(_differing_fields(own, other))
    ]
    return sorted(compatible, key=lambda other: (len(_differing_fields(own, other)), other.name))


def difference(own: ReferenceFingerprint, other: ReferenceFingerprint) -> str:
    """Return the numerics of `other` that differ from `own`: "attention sdpa, torch 2.12"."""
    return ", ".join(f"{name} {other.profile.get(name, '-')}" for name in _differing_fields(own, other))


def _differing_fields(own: ReferenceFingerprint, other: ReferenceFingerprint) -> list[str]:
    names = sorted(own.profile.keys() | other.profile.keys())
    return [name for name in names if own.profile.get(name) != other.profile.get(name)]


@dataclass(frozen=True)
class Unused:
    """Log-probs that a strict run computes although compatible ones are stored: number and numerics."""

    entries: int
    differences: list[str]


def count_unused(
    root: Path, own: ReferenceFingerprint, compatible: Sequence[ReferenceFingerprint], visited: Visited
) -> Unused:
    """Count the compatible entries that a strict run of `visited` does not use."""
    if not compatible:
        return Unused(0, [])
    store, others = LogpStore.open(root, own), LogpStore.read_only(root, compatible)
    sources = np.concatenate(
        [others.sources(data.keys[missing_responses(store, data, indices)[0]]) for data, indices in visited]
    )
    numbers = np.unique(sources[sources >= 0]).tolist()
    return Unused(int((sources >= 0).sum()), [difference(own, compatible[number]) for number in numbers])


@dataclass(frozen=True)
class Reused:
    """Entries that a run uses, by their numerics.

    Attributes:
        entries: number of distinct responses, by difference of their numerics; `OWN_NUMERICS` for none.
        audited: index of a dataset in `visited`, and its pairs with compatible entries; None if none has.
    """

    entries: dict[str, int]
    audited: tuple[int, Indices] | None


def count_reused(store: LogpStore, visited: Visited) -> Reused:
    """Count the entries of `visited`, all of them in `store`, by their numerics."""
    counts = np.zeros(len(store.fingerprints), dtype=np.int64)
    audited = None
    for number, (dataset, indices) in enumerate(visited):
        keys = dataset.keys[dataset.response_indices(indices)]
        sources = store.sources(keys)
        counts += np.bincount(sources[first_of_each(keys)], minlength=len(counts))
        of_compatible = np.unique(np.repeat(indices, dataset.response_counts(indices))[sources > 0])
        if audited is None and len(of_compatible):
            audited = number, of_compatible
    own, *compatible = store.fingerprints
    names = [OWN_NUMERICS, *(difference(own, other) for other in compatible)]
    return Reused({name: n for name, n in zip(names, counts.tolist(), strict=True) if n}, audited)
