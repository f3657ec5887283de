"""Fill the store on all ranks: find missing responses, score them, write whole shards."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dpo_dist.batching.plan import ComputeCosts
from dpo_dist.batching.sampler import Indices
from dpo_dist.data.dataset import Keys, PreferenceDataset
from dpo_dist.distributed.world import Stops, World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import collect_abandoned, locked
from dpo_dist.foundation.process import note_progress, prefetch, stopped_by
from dpo_dist.reference.scoring import Scorer, plan_round, score_round, split_into_rounds
from dpo_dist.reference.store import LogpStore, Values, first_of_each

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_LOCK = "fill.lock"
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class FillReport:
    """Distinct responses found and computed, seconds of computing, and names of damaged shards."""

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
        shards: names of all shards that the run may use; equal on all ranks. A listing is not enough: on a
            network file system it may lack files that another node just wrote.
    """

    store: LogpStore
    load_scorer: Callable[[], Scorer]
    world: World
    micro_batch_tokens: int
    costs: ComputeCosts
    entries_per_shard: int
    stops: Stops | None = None
    shards: frozenset[str] = frozenset()

    def fill(self, dataset: PreferenceDataset, indices: Indices, progress: Progress) -> FillReport:
        """Compute and store the missing log-probs of the pairs `indices` of `dataset`.

        Rank 0 decides what is missing. One job at a time fills a fingerprint; the others wait for it and then
        compute what is still missing. A killed fill loses at most two shards of each rank.
        `progress` is called with pairs done and pairs in all: at the start, and after each micro-batch.
        """
        survey = partial(self._survey, dataset, indices)
        missing, report, self.shards = self.world.on_main(survey)
        if not len(missing):
            return report
        self.world.together(self.store.check_writable)
        with self._locked() as has_waited:
            if has_waited:
                missing, report, self.shards = self.world.on_main(survey)
            self.world.on_main(lambda: collect_abandoned(self.store.folder))
            return report + self._compute(dataset, missing, progress) if len(missing) else report

    def open_filled(self) -> LogpStore:
        """Open the same shards on every rank: all that the fills found or wrote."""
        return self.world.together(lambda: self.store.reopen(self.shards))

    def _survey(
        self, dataset: PreferenceDataset, indices: Indices
    ) -> tuple[Indices, FillReport, frozenset[str]]:
        """Return the responses that are missing now, a report, and the shards that exist; not collective."""
        store = self.store.reopen()
        missing, hits = missing_responses(store, dataset, indices)
        return missing, FillReport(hits, damaged=frozenset(store.damaged)), self.shards.union(store.shards)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Let no other job fill this fingerprint inside the block; yield whether one had to be waited for."""
        with contextlib.ExitStack() as lock:

            def take() -> bool:
                with contextlib.suppress(ConfigError):
                    lock.enter_context(locked(self.store.folder / _LOCK, "fills this reference store", ""))
                    return True
                return False

            has_waited = False
            while not self.world.on_main(take):
                if not has_waited:
                    log.warning("another job fills %s: this one waits for it", self.store.folder)
                has_waited = True
                if self.stops is not None:
                    self.stops.check("while another job fills the reference store")
                time.sleep(_RETRY_SECONDS)
            yield has_waited

    def _compute(self, dataset: PreferenceDataset, missing: Indices, progress: Progress) -> FillReport:
        """Score responses in rounds; while one round is scored, the shards of the one before are written."""
        started, done, is_stopped = time.monotonic(), 0, False
        score, written, stored = self.load_scorer(), set[str](), 0
        plan = partial(plan_round, dataset, self.world, self.micro_batch_tokens, self.costs)
        pairs_of_round = max(1, self.entries_per_shard // 2) * self.world.replicas
        rounds = split_into_rounds(dataset, missing, pairs_of_round)
        pairs = len(np.unique(dataset.locate_responses(missing)[0]))
        must_stop = self.stops.must_stop if self.stops is not None else lambda: False
        progress(0, pairs)
        with prefetch(map(plan, rounds), 1) as planned, ThreadPoolExecutor(1, "shards") as pool:
            writing: Future[set[str]] = pool.submit(set)
            for round_ in planned:

                def within(share: float, before: int = done, own: int = round_.pairs) -> None:
                    progress(before + int(share * own), pairs)

                keys, entries, is_stopped = score_round(dataset, round_, score, self.world, within, must_stop)
                written |= self.world.together(writing.result)
                writing = pool.submit(self._write, keys, entries)
                stored, done = stored + len(keys), done + round_.pairs
                if is_stopped:
                    break
            written |= self.world.together(writing.result)
        self.shards = self.shards.union(*self.world.gather(written))
        if is_stopped and self.stops is not None:
            in_all = sum(self.world.gather(stored))
            when = f"after {in_all:,} of the {len(missing):,} missing reference log-probs were stored"
            raise stopped_by(self.stops.reasons(), when)
        return FillReport(computed=len(missing), seconds=time.monotonic() - started)

    def _write(self, keys: Keys, entries: list[Values]) -> set[str]:
        """Write this rank's shard of a round, if it has entries; return its name."""
        if not entries:
            return set()
        name = self.store.write(keys, entries)
        note_progress(name)
        return {name}


def missing_responses(store: LogpStore, dataset: PreferenceDataset, indices: Indices) -> tuple[Indices, int]:
    """Return the distinct responses of the pairs `indices` without an intact entry, and how many have one.

    The first are int64 [missing], ascending indices in `dataset.keys`.
    """
    responses = dataset.response_indices(indices)
    distinct = responses[first_of_each(dataset.keys[responses])]
    stored = store.contains(dataset.keys[distinct])
    return np.sort(distinct[~stored]), int(stored.sum())
