"""Fill the store with what it lacks: find missing responses, score them on all ranks, write whole shards."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpo_dist.data.dataset import PairDataset
from dpo_dist.data.pack import PackedBatch, dummy_batch, pack, plan_micro_batches
from dpo_dist.data.schedule import Rows
from dpo_dist.distributed.runtime import World
from dpo_dist.reference.store import LogpStore, Values

Places = npt.NDArray[np.int64]
Scorer = Callable[[PackedBatch], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FillReport:
    """What a fill did: distinct responses found stored, computed, and the seconds that computing took."""

    hits: int = 0
    computed: int = 0
    seconds: float = 0.0

    def __add__(self, other: "FillReport") -> "FillReport":
        return FillReport(
            self.hits + other.hits, self.computed + other.computed, self.seconds + other.seconds
        )

    def as_dict(self) -> dict[str, Any]:
        """For summary.json."""
        return {"hits": self.hits, "computed": self.computed, "seconds": round(self.seconds, 3)}


def missing_responses(store: LogpStore, dataset: PairDataset, rows: Rows) -> tuple[Places, int]:
    """Places in `dataset.keys` of the distinct responses of `rows` that have no valid stored row, and how
    many have one.
    """
    places = dataset.response_places(rows)
    _, first = np.unique(dataset.keys[places], axis=0, return_index=True)
    distinct = np.sort(places[first])
    held = store.holds(dataset.keys[distinct])
    return distinct[~held], int(held.sum())


def fill_store(
    open_store: Callable[[Sequence[str] | None], LogpStore],
    dataset: PairDataset,
    needed: Rows,
    scorer: Callable[[], Scorer],
    world: World,
    micro_batch_tokens: int,
    rows_per_shard: int,
    progress: Progress,
) -> FillReport:
    """Compute and store what the pairs `needed` of `dataset` need and the store lacks; collective.

    Rank 0 says what is missing, so that all ranks agree while other jobs write to the same store. Each rank
    writes the rows it computed as shards of its own; a killed fill loses at most one shard of each rank.

    Args:
        open_store: opens the store, at the given shards or at all there are.
        scorer: gives the reference's log-probs of a batch; called only if something is missing.
        rows_per_shard: about how many rows a shard holds.
        progress: called after every round with pairs done and pairs in all.
    """
    missing, hits = world.on_main(lambda: missing_responses(open_store(None), dataset, needed))
    if not len(missing):
        return FillReport(hits=hits)
    started = time.monotonic()
    score = scorer()
    store = open_store([])
    pairs = _by_pair(dataset, missing)
    per_round = max(1, rows_per_shard // 2) * world.size
    for start in range(0, len(pairs), per_round):
        work = pairs[start : start + per_round]
        keys, rows = _score_round(dataset, work, score, world, micro_batch_tokens)
        world.together(lambda keys=keys, rows=rows: store.write(keys, rows) if rows else "")  # type: ignore[misc]
        progress(min(start + per_round, len(pairs)), len(pairs))
    return FillReport(hits, len(missing), time.monotonic() - started)


def open_filled(open_store: Callable[[Sequence[str] | None], LogpStore], world: World) -> LogpStore:
    """The store as rank 0 sees it now, opened by every rank at the same shards; collective."""
    names = world.on_main(lambda: open_store(None).names)
    return world.together(lambda: open_store(names))


@dataclass(frozen=True)
class _Pair:
    """A pair with the responses of it that are to be scored."""

    row: int
    which: tuple[int, ...]


def _by_pair(dataset: PairDataset, places: Places) -> list[_Pair]:
    pairs: dict[int, list[int]] = {}
    for place in places.tolist():
        row, which = dataset.row_of_response(place)
        pairs.setdefault(row, []).append(which)
    return [_Pair(row, tuple(which)) for row, which in pairs.items()]


def _score_round(
    dataset: PairDataset, pairs: Sequence[_Pair], score: Scorer, world: World, micro_batch_tokens: int
) -> tuple[npt.NDArray[np.uint64], list[Values]]:
    """This rank's share of `pairs`, scored: keys uint64 [n, 2] and their rows."""
    tokens = [dataset.packed_tokens(pair.row, pair.which) for pair in pairs]
    keys: list[npt.NDArray[np.uint64]] = [np.empty((0, 2), dtype=np.uint64)]
    rows: list[Values] = []
    for ranks in plan_micro_batches(tokens, world.size, micro_batch_tokens):
        batch = _pack([pairs[place] for place in ranks[world.rank]], dataset)
        logps = score(batch.to(world.device))
        if len(batch.keys):
            keys.append(batch.keys)
            rows.extend(_split(logps, batch))
    return np.concatenate(keys), rows


def _pack(pairs: Sequence[_Pair], dataset: PairDataset) -> PackedBatch:
    if not pairs:
        return dummy_batch()
    places = [dataset.response_rows(pair.row)[which] for pair in pairs for which in pair.which]
    return pack([dataset.sequences(pair.row, pair.which) for pair in pairs], dataset.keys[places])


def _split(logps: Tensor, batch: PackedBatch) -> Iterator[Values]:
    values = logps.cpu().numpy()
    ends = np.cumsum(batch.response_tokens.numpy())
    yield from np.split(values, ends[:-1])
