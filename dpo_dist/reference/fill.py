"""Fill the store on all ranks: find the responses without log-probs, score them in rounds, write shards.

A pair is any example here, whatever the number of its responses.
"""

import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dpo_dist.batching.content_keys import Keys, response_keys
from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.pack import DUMMY_RESPONSES, PackedBatch, dummy_batch, pack
from dpo_dist.batching.plan import deal_out, plan_micro_batches
from dpo_dist.batching.sampler import Indices
from dpo_dist.distributed.processes.world import Stops, World, check_shared
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation.background import prefetch
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import locked, remove_abandoned, write_json
from dpo_dist.foundation.process import note_progress
from dpo_dist.foundation.signals import stopped_by
from dpo_dist.reference.behind import Behind, fault_of_logps
from dpo_dist.reference.store import RECIPE_FILE, LogpStore, StoredLogps, read_fingerprints

log = logging.getLogger(__name__)

FillProgress = Callable[[int, int], None]
"""Called with the number of scored pairs, and of all pairs."""

Scorer = Callable[[PackedBatch], Tensor]
"""Per-token log-probs of a batch by the reference model, float32 [targets]; by a teacher [width, targets]."""

_BATCHES_AHEAD = 2
_LOCK = "fill.lock"
_RETRY_SECONDS = 1.0
RESPONSES_AT_ONCE = 1 << 20
"""Of which `missing_responses` has the keys in memory."""
ENTRIES_PER_SHARD = 4096
"""Larger shards would lose more work (`StoreFiller.fill`)."""


@dataclass(frozen=True)
class FillReport:
    """Counts of responses and the time of a fill.

    Attributes:
        hits: distinct responses whose log-probs were in the store.
        computed: distinct responses that were scored now.
        seconds: time of scoring.
        damaged: names of damaged shards.
        rounded: responses whose log-probs are of another fingerprint, by its name (`reference.accept`).
        fetched: counts of each store behind this one in all fills so far, by its URL.
    """

    hits: int = 0
    computed: int = 0
    seconds: float = 0.0
    damaged: frozenset[str] = frozenset()
    rounded: Mapping[str, int] = field(default_factory=dict)
    fetched: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __add__(self, other: "FillReport") -> "FillReport":
        return FillReport(
            self.hits + other.hits,
            self.computed + other.computed,
            self.seconds + other.seconds,
            self.damaged | other.damaged,
            Counter(self.rounded) + Counter(other.rounded),
            {**self.fetched, **other.fetched},
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report's fields of the section `reference` in summary.json."""
        return {**vars(self), "seconds": round(self.seconds, 3), "damaged": sorted(self.damaged)}


class _Part(NamedTuple):
    """A pair's responses to score: `responses` are indices in the dataset's `keys`, `which` in the pair."""

    pair: int
    responses: Indices
    which: Indices


@dataclass
class StoreFiller:
    """Computes and stores the missing log-probs of a run; all public methods are collective.

    Attributes:
        store: the store to fill; the entries that it has opened do not matter.
        load_scorer: loads the reference; called only if log-probs are missing.
        micro_batch_tokens: tokens that a device can score at once.
        costs: the model's compute costs, which balance the ranks; `load_scorer` may set them.
        entries_per_shard: approximate number of entries in a shard.
        stops: checked after each micro-batch.
        which: only this response of each pair is scored; None: all.
        prepare: adds to a batch on the host what the scorer needs.
        behind: published stores, which are asked for what is missing.
        recipe: what decides the run's token ids, for those who fetch from this store.
        rounding: entries under fingerprints that differ by rounding are taken, too.
        fault: returns, in words, why a stranger's values cannot be an entry's; "" if they can.
        shards: names of all shards that the run may use, the same on all ranks. Listing the folder is not
            enough: a network file system may not show files that another node just wrote.
        computed_tokens: those of the micro-batches of this rank.
        tokens: the same if nothing but prompts were shared.
    """

    store: LogpStore
    load_scorer: Callable[[], Scorer]
    world: World
    micro_batch_tokens: int
    costs: ComputeCosts
    entries_per_shard: int
    stops: Stops
    which: int | None = None
    prepare: Callable[[PackedBatch], PackedBatch] = lambda batch: batch
    behind: Sequence[Behind] = ()
    rounding: bool = False
    fault: Callable[[StoredLogps], str] = fault_of_logps
    recipe: Mapping[str, Any] = field(default_factory=dict)
    shards: frozenset[str] = frozenset()
    computed_tokens: int = 0
    tokens: int = 0

    def fill(self, dataset: PreferenceDataset, indices: Indices, progress: FillProgress) -> FillReport:
        """Compute and store the missing log-probs of the pairs `indices` of `dataset`.

        Rank 0 decides which are missing. One job at a time fills a fingerprint; other jobs wait for that job
        and compute what is still missing. A killed fill loses at most two shards of each rank.
        `progress` is called at the start and after each micro-batch.
        """

        survey = partial(self.survey, dataset, indices)
        missing, report, self.shards = self.world.on_main(survey)
        if not len(missing):
            return report
        check_shared(self.world, self.store.folder, "reference.store")
        self.world.together(self.store.check_writable)
        with self._lock_store() as has_waited:
            if has_waited:
                missing, report, self.shards = self.world.on_main(survey)
            self.world.on_main(self._begin)
            if self.behind:
                missing, fetched, self.shards = self.world.on_main(partial(self._fetch, dataset, missing))
                report += fetched
                self.stops.check("while log-probs were fetched")
            return report + self._compute(dataset, missing, progress) if len(missing) else report

    def survey(
        self, dataset: PreferenceDataset, indices: Indices
    ) -> tuple[Indices, FillReport, frozenset[str]]:
        """Return the missing responses, what the store has, and the names of its shards; not collective."""
        store = LogpStore.open(self.store.root, self.store.fingerprint)
        missing, hits = missing_responses(store, dataset, indices, self.which)
        shards = self.shards.union(store.shards)
        damaged = frozenset(store.damaged)
        rounded = dict[str, int]()
        others = read_fingerprints(store.root) if self.rounding else []
        for fingerprint in filter(store.fingerprint.rounds, others):
            other = LogpStore.open(store.root, fingerprint)
            is_found = other.contains(dataset.keys[missing])
            if is_found.any():
                rounded[fingerprint.name] = int(is_found.sum())
                missing = missing[~is_found]
                shards = shards.union(other.shards)
        return missing, FillReport(hits + sum(rounded.values()), 0, 0.0, damaged, rounded), shards

    def _begin(self) -> None:
        """Remove what killed jobs have left, and write the recipe; not collective."""
        remove_abandoned(self.store.folder)
        if self.recipe:
            with contextlib.suppress(OSError):  # a full disk is an error of the shards
                write_json(self.store.folder / RECIPE_FILE, self.recipe)

    def _fetch(
        self, dataset: PreferenceDataset, missing: Indices
    ) -> tuple[Indices, FillReport, frozenset[str]]:
        """Write what stores behind have of the missing responses as shards of this one; not collective.

        Returns the responses that are still missing, counts, and the names of all shards.
        """
        written = set[str]()
        counts = {}
        rounded = Counter[str]()
        for behind in self.behind:
            if not len(missing):
                break
            pieces = missing + dataset.locate_responses(missing)[0] + 1
            tokens = dataset.piece_tokens[pieces].astype(np.int64)
            keys = dataset.keys[missing]
            is_found = np.zeros(len(keys), dtype=np.bool_)
            found = behind.find(
                self.store.fingerprint, keys, tokens, self.fault, self.recipe, rounding=self.rounding
            )
            # What was fetched before a signal is kept; all ranks agree on the stop afterwards.
            found = itertools.takewhile(lambda _: not self.stops.request.is_urgent, found)
            for fingerprint, entries in itertools.groupby(found, lambda each: each[0]):
                store = LogpStore.open(self.store.root, fingerprint)
                names = set[str]()
                while some := list(itertools.islice(entries, self.entries_per_shard)):
                    rows = [row for _, row, _ in some]
                    names |= self._write_shard(store, keys[rows], [entry for *_, entry in some], behind.url)
                    is_found[rows] = True
                    if fingerprint != self.store.fingerprint:
                        rounded[fingerprint.name] += len(rows)
                store.remember(names)
                written |= names
            missing = missing[~is_found]
            counts[behind.url] = asdict(behind)
        return missing, FillReport(rounded=rounded, fetched=counts), self.shards.union(written)

    def open_filled(self) -> LogpStore:
        """Return the store with the same shards on every rank: those found and those written."""

        def open_all() -> LogpStore:
            return LogpStore.open(self.store.root, self.store.fingerprint, self.shards)

        self.world.on_main(lambda: len(open_all()))  # writes the index, which all ranks map
        return self.world.together(open_all)

    @contextlib.contextmanager
    def _lock_store(self) -> Iterator[bool]:
        """Lock this fingerprint against other jobs; yield whether another job held the lock before."""
        with contextlib.ExitStack() as lock:

            def take() -> bool:
                with contextlib.suppress(ConfigError):
                    lock.enter_context(locked(self.store.folder / _LOCK, "fills this reference store", ""))
                    return True
                return False

            has_waited = False
            while not self.world.on_main(take):
                if not has_waited:
                    log.warning("waiting for another job, which fills %s", self.store.folder)
                has_waited = True
                self.stops.check("while another job fills the reference store")
                time.sleep(_RETRY_SECONDS)
            yield has_waited

    def _compute(self, dataset: PreferenceDataset, missing: Indices, progress: FillProgress) -> FillReport:
        """Score responses in rounds; while a round is scored, the round before it is written."""
        started = time.monotonic()
        done = 0
        is_stopped = False
        score = self.load_scorer()
        written = set[str]()
        stored = 0
        pairs_per_round = max(1, self.entries_per_shard // 2) * self.world.replicas
        owners = dataset.locate_responses(missing)[0]
        if dataset.prefixes is not None and self.costs.shares_prefixes:
            order = np.lexsort((missing, dataset.prefixes.places[owners]))
            missing, owners = missing[order], owners[order]
        # By 2 ranks and 4 entries per shard, a round has 4 pairs: with owners [0 0 1 2 2 3 4 4], the pairs of
        # the responses, firsts is [0 2 3 5 6], where each pair begins, and the second round begins at 6.
        firsts = np.flatnonzero(np.diff(owners, prepend=-1))
        rounds = map(np.sort, np.split(missing, firsts[pairs_per_round::pairs_per_round]))
        progress(0, len(firsts))
        plans = map(partial(self._plan_round, dataset), rounds)
        with prefetch(plans, 1) as planned, ThreadPoolExecutor(1, "shards") as pool:
            writing: Future[set[str]] = pool.submit(set)
            for round_pairs, micro_batches in planned:
                within = partial(_report_round, progress, done, round_pairs, len(firsts))
                keys, entries, is_stopped = self._score(dataset, micro_batches, score, within)
                # Written behind the scoring, and raised on all ranks: a full disk is an error of one rank,
                # for which the others would wait in the next forward (law L2).
                written |= self.world.together(writing.result)
                writing = pool.submit(self._write_shard, self.store, keys, entries)
                stored += len(keys)
                done += round_pairs
                if is_stopped:
                    break
            written |= self.world.together(writing.result)
        written = written.union(*self.world.gather(written))
        self.world.on_main(lambda: self.store.remember(written))
        self.shards = self.shards.union(written)
        if is_stopped:
            stored_everywhere = sum(self.world.gather(stored))
            when = (
                f"after {stored_everywhere:,} of the {len(missing):,} missing reference log-probs were stored"
            )
            raise stopped_by(self.stops.reasons(), when)
        return FillReport(computed=len(missing), seconds=time.monotonic() - started)

    def _plan_round(self, dataset: PreferenceDataset, responses: Indices) -> tuple[int, list[list[_Part]]]:
        """Return a round's number of pairs, and this rank's micro-batches; not collective."""
        owners, which = dataset.locate_responses(responses)
        pairs, firsts, counts = np.unique(owners, return_index=True, return_counts=True)
        sizes = dataset.sizes(pairs, responses, counts, self.costs)
        # Each rank plans only its own share: the shares of thousands of pairs are nearly equal.
        mine = deal_out(sizes, self.costs, self.world.replicas)[self.world.replica]
        slices = zip(pairs[mine], firsts[mine], firsts[mine] + counts[mine], strict=True)
        parts = [_Part(int(pair), responses[at:end], which[at:end]) for pair, at, end in slices]
        bins = plan_micro_batches(sizes.select(mine), 1, self.micro_batch_tokens, self.costs)
        return len(pairs), [[parts[number] for number in numbers] for (numbers,) in bins]

    def _write_shard(
        self, store: LogpStore, keys: Keys, entries: list[StoredLogps], url: str = ""
    ) -> set[str]:
        """Write a shard of these entries; return its name, none without entries. Not collective."""
        if not entries:
            return set()
        name = store.write(keys, entries, url)
        note_progress(name)
        return {name}

    def _score(
        self,
        dataset: PreferenceDataset,
        micro_batches: Sequence[Sequence[_Part]],
        score: Scorer,
        progress: Callable[[float], None],
    ) -> tuple[Keys, list[StoredLogps], bool]:
        """Score this rank's micro-batches of a round, the same number on every rank (law L2). Collective.

        `progress` is called with the share of the round that is done. Returns the keys of this rank's
        responses, uint64 [n, 2], their log-probs, and whether the fill must stop. Only the first rank of a
        replica returns responses.
        """
        world = self.world
        # The ranks agree on what each micro-batch needs, because a forward is collective under ZeRO-3: a rank
        # with fewer responses, or without an image, makes the calls of the others.
        needs_here = []
        for parts in micro_batches:
            pairs = np.array([part.pair for part in parts], dtype=np.int64)
            responses = sum(len(part.responses) for part in parts)
            needs_here.append(_Needs(max(DUMMY_RESPONSES, responses), bool(dataset.with_images(pairs).any())))
        by_number = itertools.zip_longest(*world.gather(needs_here), fillvalue=_Needs())
        needs = [_Needs(*map(max, zip(*every, strict=True))) for every in by_number]
        keys: list[Keys] = [np.empty((0, 2), dtype=np.uint64)]
        entries: list[StoredLogps] = []
        damaged: list[int] = []  # the error waits until all ranks have scored the round
        is_stopped = False
        with prefetch(self._packed(dataset, micro_batches, needs), _BATCHES_AHEAD) as batches:
            for number, (batch, with_other_ids) in enumerate(batches, start=1):
                damaged += with_other_ids
                logps = score(batch.to(world.device))
                self.computed_tokens += batch.tokens
                if batch.tokens:
                    self.tokens += sum(map(sum, batch.layout))
                if world.leads and len(batch.keys):
                    keys.append(batch.keys)
                    ends = np.cumsum(batch.response_tokens.numpy())[:-1]
                    entries += np.split(logps.movedim(-1, 0).cpu().numpy(), ends)
                progress(number / len(needs))
                is_stopped = self.stops.must_stop()
                if is_stopped:
                    break

        def check_ids() -> None:
            if damaged:
                raise dataset.damaged_ids(damaged)

        world.together(check_ids)
        return np.concatenate(keys), entries, is_stopped

    def _packed(
        self, dataset: PreferenceDataset, micro_batches: Sequence[Sequence[_Part]], needs: Sequence["_Needs"]
    ) -> Iterator[tuple[PackedBatch, list[int]]]:
        """Yield a packed micro-batch for each of `needs`, dummies after this rank's last one.

        Beside it the pairs whose token ids do not have the keys that were stored: then it is a dummy, too.
        """
        dummies: list[list[_Part]] = [[]] * (len(needs) - len(micro_batches))
        for parts, (forwards, images) in zip([*micro_batches, *dummies], needs, strict=True):
            examples = [dataset.example(part.pair, part.which.tolist()) for part in parts]
            numbers = np.concatenate([np.empty(0, np.int64), *(part.responses for part in parts)])
            keys = dataset.keys[numbers]
            dummy_image = dataset.dummy_image() if images else None
            is_whole = np.array_equal(response_keys(examples), keys)
            if parts and is_whole:
                inputs = dataset.with_inputs(examples)
                batch = pack(inputs, keys, dummy_image=dummy_image, costs=self.costs)
            else:
                batch = dummy_batch(dummy_image)
            batch = self.prepare(replace(batch, forwards=forwards))
            if self.world.device.type == "cuda":
                batch = batch.pinned()
            yield batch, [] if is_whole else [part.pair for part in parts]


class _Needs(NamedTuple):
    """What every rank needs in a micro-batch, so that all make the same collective calls (law L2)."""

    forwards: int = DUMMY_RESPONSES
    images: bool = False  # the model's tower encodes an image


def _report_round(progress: FillProgress, before: int, pairs: int, total: int, share: float) -> None:
    """Report the pairs before a round, and the done share of the round's `pairs`."""
    progress(before + int(share * pairs), total)


def missing_responses(
    store: LogpStore, dataset: PreferenceDataset, indices: Indices, which: int | None = None
) -> tuple[Indices, int]:
    """Return the distinct responses of the pairs `indices` that the store lacks, and how many it has.

    With `which`, only this response of each pair counts. The missing ones are ascending indices in
    `dataset.keys`, int64 [missing]. A damaged entry is missing.
    """
    visited = np.zeros(len(dataset), dtype=np.bool_)
    visited[indices] = True
    counts = np.diff(dataset.first_pieces) - 1
    is_needed = np.repeat(visited, counts)
    if which is not None:
        starts = np.cumsum(counts) - counts
        is_needed[:] = False
        is_needed[starts[indices] + which] = True
    order = dataset.key_order[is_needed[dataset.key_order]]
    hits = 0
    missing = [np.empty(0, np.int64)]
    for start in range(0, len(order), RESPONSES_AT_ONCE):
        responses = order[start : start + RESPONSES_AT_ONCE]
        keys = dataset.keys[order[max(start - 1, 0) : start + RESPONSES_AT_ONCE]]
        is_new = (keys[1:] != keys[:-1]).any(axis=1)
        if not start:
            is_new = np.insert(is_new, 0, True)
        responses = responses[is_new]
        stored = store.contains(dataset.keys[responses])
        hits += int(stored.sum())
        missing.append(responses[~stored].astype(np.int64))
    return np.sort(np.concatenate(missing)), hits
