"""Measure the reference store with many entries: invented keys and short responses.

Writes entries in shards of the default size, opens the store, looks random entries up, and searches a dataset
for missing responses; then does the same with many small shards. Figures that end in `_cpu` are CPU time of
this process.
"""

import gc
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from benchmarks.options import Benchmark, Json, markdown
from dpo_dist.batching.content_keys import Keys
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.dataset_columns import key_order
from dpo_dist.reference.fill import ENTRIES_PER_SHARD, missing_responses
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint

FINGERPRINT = ReferenceFingerprint("invented", {})
PROMPT_TOKENS = 32
LOOKUP_BATCH = 64

Figures = dict[str, float]


def run(options: Namespace) -> Json:
    """Measure writing, opening and reading."""
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        figures: Figures = {"entries": options.entries}
        figures |= _measure_large(Path(name, "large"), options.entries)
        figures |= _measure_small_shards(Path(name, "small"), options.small_shards)
    print(markdown([["figure", "value"], *([key, f"{value:,.6g}"] for key, value in figures.items())]))
    return figures


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--entries", type=int, default=10_000_000, help="responses in the store")
    parser.add_argument("--small-shards", type=int, default=5_000, help="shards of 20 entries")


def _measure_large(root: Path, entries: int) -> Figures:
    """Measure one store of `entries` entries in shards of the default size."""
    dataset = _invented_pairs(entries // 2)
    figures: Figures = {}
    with _add_seconds(figures, "write_seconds"):
        _write(root, dataset, ENTRIES_PER_SHARD)
    gc.collect()
    anonymous = _anonymous_bytes()
    cpu = time.process_time()
    with _add_seconds(figures, "open_seconds"):
        store = LogpStore.open(root, FINGERPRINT)
    figures["open_seconds_cpu"] = time.process_time() - cpu
    figures["index_bytes_per_entry"] = (_anonymous_bytes() - anonymous) / entries
    with _add_seconds(figures, "missing_seconds"):
        missing, found = missing_responses(store, dataset, np.arange(len(dataset)))
    assert (len(missing), found) == (0, len(dataset.keys)), "a written entry is not found"
    figures["lookups_per_second"] = _lookups_per_second(store, dataset, time.perf_counter)
    figures["lookups_per_second_cpu"] = _lookups_per_second(store, dataset, time.process_time)
    return {**figures, "shards": len(store.shards)}


def _measure_small_shards(root: Path, shards: int) -> Figures:
    """Measure a store of many shards of 20 entries, which many short jobs have written."""
    dataset = _invented_pairs(shards * 10)
    _write(root, dataset, 20)
    figures: Figures = {"small_shards": shards}
    with _add_seconds(figures, "small_shards_open_seconds"):
        store = LogpStore.open(root, FINGERPRINT)
    figures["small_shards_lookups_per_second"] = _lookups_per_second(store, dataset, time.perf_counter)
    return figures


def _invented_pairs(pairs: int) -> PreferenceDataset:
    """Return pairs with responses of 8 to 24 tokens and random keys; all token ids are 0."""
    generator = np.random.default_rng(0)
    pieces = np.full((pairs, 3), PROMPT_TOKENS)
    pieces[:, 1:] = generator.integers(8, 25, (pairs, 2))
    ends = np.cumsum(pieces)
    keys = generator.integers(0, 2**64, (2 * pairs, 2), dtype=np.uint64)
    return PreferenceDataset(
        fingerprint="",
        counts={},
        source_paths=("",),
        source_pairs=(pairs,),
        source_labels=("",),
        largest_id=99,
        ids=np.zeros(int(ends[-1]), dtype=np.int32),
        piece_starts=ends - pieces.ravel(),
        piece_tokens=pieces.ravel(),
        first_pieces=np.arange(0, 3 * pairs + 1, 3),
        keys=keys,
        key_order=key_order(keys),
        scores=np.full(2 * pairs, np.nan),
        trained=np.empty(0, dtype=np.bool_),
        mask_starts=np.zeros(2 * pairs, dtype=np.int64),
        trained_tokens=pieces[:, 1:].ravel(),
        truncated=np.zeros(2 * pairs, dtype=np.bool_),
        begins=np.zeros(2 * pairs, dtype=np.int32),
        prompt_hashes=np.arange(pairs, dtype=np.uint64),
        digests=np.arange(pairs, dtype=np.uint64),
        origins=np.zeros((pairs, 2), dtype=np.int64),
    )


def _write(root: Path, dataset: PreferenceDataset, entries_per_shard: int) -> None:
    """Write an entry for each response, with values from its key: they show if a lookup is wrong."""
    store = LogpStore.open(root, FINGERPRINT, [])
    lengths = np.asarray(dataset.piece_tokens).reshape(-1, 3)[:, 1:].ravel()
    for start in range(0, len(dataset.keys), entries_per_shard):
        keys = dataset.keys[start : start + entries_per_shard]
        numbers = _values_from_keys(keys)
        values = [np.full(n, v) for n, v in zip(lengths[start : start + len(keys)], numbers, strict=True)]
        store.write(keys, values)


def _values_from_keys(keys: Keys) -> np.ndarray:
    """Return float32 [n]: a value from each key, different for most keys."""
    return (keys[:, 1] >> np.uint64(44)).astype(np.float32)


def _lookups_per_second(store: LogpStore, dataset: PreferenceDataset, clock: Callable[[], float]) -> float:
    """Return entries per second of random batches, after a first pass that checks their values."""
    indices = np.random.default_rng(1).integers(0, len(dataset.keys), (4_000, LOOKUP_BATCH))
    batches = [dataset.keys[batch] for batch in indices]
    for keys in batches:
        assert [row[0] for row in store.read(keys)] == _values_from_keys(keys).tolist(), (
            "the entry of another key"
        )
    started = clock()
    for keys in batches:
        store.read(keys)
    return indices.size / (clock() - started)


def _anonymous_bytes() -> int:
    """Return this process's memory in bytes, without mapped files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


@contextmanager
def _add_seconds(figures: Figures, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    figures[name] = time.perf_counter() - started


BENCHMARK = Benchmark(run, own=_own_options, smoke={"entries": 20_000, "small_shards": 50})
