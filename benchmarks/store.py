"""Measure the store of reference log-probs at scale, with invented keys and short rows.

python -m benchmarks store [--rows 10000000] [--folder DIR] [--smoke]

Writes the rows in shards of the default size, opens them, looks rows up at random, asks which responses of a
data set are missing, and does the same over many small shards. Figures that end in `_cpu` are by its own
CPU time. Then fills, with a model that takes no time and with a real one of 40 million parameters:

    fill_microseconds_per_pair   wall time of the first
    fill_outside_model_share     of the second's wall time, what was not the model's own
    fill_host_share              the first's time of a pair over the model's: the share if nothing overlapped

The last line is the figures as JSON.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from benchmarks.assets import SHAPES, save_random_model
from dpo_dist.config.schema import Dtype, ModelConfig, ReferenceConfig
from dpo_dist.data.dataset import Keys, PreferenceDataset
from dpo_dist.data.encode import response_key
from dpo_dist.data.micro_batches import ComputeCosts
from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.world import World
from dpo_dist.model.load import load_packed
from dpo_dist.reference.fill import FillReport, StoreFiller, missing_responses
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.scoring import Scorer
from dpo_dist.reference.store import LogpStore

FINGERPRINT = ReferenceFingerprint("invented", {})
PROMPT_TOKENS = 32
MICRO_BATCH_TOKENS = 8192
LOOKUP_BATCH = 64

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000, help="responses in the store")
    parser.add_argument("--small-shards", type=int, default=5_000, help="shards of 20 rows of a second store")
    parser.add_argument(
        "--folder", type=Path, help="where the stores are written, and removed (default: /tmp)"
    )
    parser.add_argument("--smoke", action="store_true", help="seconds; checks that this script works")
    arguments = parser.parse_args()
    rows, small_shards = (20_000, 50) if arguments.smoke else (arguments.rows, arguments.small_shards)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        figures: Figures = {"rows": rows}
        figures |= bench_large(Path(name, "large"), rows)
        figures |= bench_small_shards(Path(name, "small"), small_shards)
        figures |= bench_fill(Path(name, "fill"), min(rows, 200_000))
        pairs, shape = (32, "tiny") if arguments.smoke else (512, "40m")
        figures |= bench_fill_beside_model(Path(name, "model"), pairs, shape)
        host, model = figures["fill_microseconds_per_pair"], figures["model_microseconds_per_pair"]
        figures["fill_host_share"] = host / model
    for key, value in figures.items():
        print(f"{key:<44} {value:,.6g}")
    print(json.dumps(figures))


def bench_large(root: Path, rows: int) -> Figures:
    """One store of `rows` rows in shards of the default size."""
    dataset = invented_pairs(rows // 2)
    figures: Figures = {}
    with timed(figures, "write_seconds"):
        write(root, dataset, ReferenceConfig().rows_per_shard)
    gc.collect()
    anonymous = anonymous_bytes()
    cpu = time.process_time()
    with timed(figures, "open_seconds"):
        store = LogpStore.open(root, FINGERPRINT)
    figures["open_seconds_cpu"] = time.process_time() - cpu
    figures["index_bytes_per_row"] = (anonymous_bytes() - anonymous) / rows
    with timed(figures, "missing_seconds"):
        missing, held = missing_responses(store, dataset, np.arange(len(dataset)))
    assert (len(missing), held) == (0, len(dataset.keys)), "a row that was written is not found"
    figures["lookups_per_second"] = lookups_per_second(store, dataset, time.perf_counter)
    figures["lookups_per_second_cpu"] = lookups_per_second(store, dataset, time.process_time)
    return {**figures, "shards": len(store.shards)}


def bench_small_shards(root: Path, shards: int) -> Figures:
    """A store of many shards of 20 rows, as many short jobs leave it."""
    dataset = invented_pairs(shards * 10)
    write(root, dataset, 20)
    figures: Figures = {"small_shards": shards}
    with timed(figures, "small_shards_open_seconds"):
        store = LogpStore.open(root, FINGERPRINT)
    figures["small_shards_lookups_per_second"] = lookups_per_second(store, dataset, time.perf_counter)
    return figures


def bench_fill(root: Path, responses: int) -> Figures:
    """What a fill costs beside its model: find, plan, pack, split, write; one process."""
    dataset = scorable(invented_pairs(responses // 2))
    report = fill(
        root, dataset, lambda batch: torch.zeros(len(batch.targets)), ReferenceConfig.rows_per_shard
    )
    return {"fill_microseconds_per_pair": report.seconds / len(dataset) * 1e6}


def bench_fill_beside_model(root: Path, pairs: int, shape: str) -> Figures:
    """A fill in eight rounds with a real model, in float32 on this machine's CPU."""
    save_random_model(SHAPES[shape], root / "model", seed=0)
    setting = ModelConfig(path=str(root / "model"), dtype=Dtype.fp32)
    model = load_packed(root / "model", setting, 1024, torch.device("cpu"))
    seconds = 0.0

    @torch.no_grad()
    def score(batch: PackedBatch) -> torch.Tensor:
        nonlocal seconds
        started = time.monotonic()
        logps: torch.Tensor = model(batch)
        seconds += time.monotonic() - started
        return logps

    report = fill(root / "store", scorable(invented_pairs(pairs)), score, pairs // 4)
    return {
        "fill_outside_model_share": 1 - seconds / report.seconds,
        "model_microseconds_per_pair": seconds / pairs * 1e6,
    }


def fill(root: Path, dataset: PreferenceDataset, score: Scorer, rows_per_shard: int) -> FillReport:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        world, costs = World(None, 0, 1, torch.device("cpu"), ()), ComputeCosts(key=1 / 8192, target=0.1)
        store = LogpStore(root, [FINGERPRINT], [])
        filler = StoreFiller(store, lambda: score, world, MICRO_BATCH_TOKENS, costs, rows_per_shard)
        report = filler.fill(dataset, np.arange(len(dataset)), lambda _done, _total: None)
    finally:
        dist.destroy_process_group()
    assert report.computed == len(dataset.keys)
    return report


def invented_pairs(pairs: int) -> PreferenceDataset:
    """Pairs of two responses of 8 to 24 tokens each, with random keys; the ids are zeros."""
    generator = np.random.default_rng(0)
    pieces = np.full((pairs, 3), PROMPT_TOKENS)
    pieces[:, 1:] = generator.integers(8, 25, (pairs, 2))
    ends = np.cumsum(pieces)
    return PreferenceDataset(
        fingerprint="",
        counts={},
        source_paths=("",),
        source_pairs=(pairs,),
        largest_id=99,
        ids=np.zeros(int(ends[-1]), dtype=np.int32),
        piece_starts=ends - pieces.ravel(),
        piece_tokens=pieces.ravel(),
        pair_pieces=np.arange(3, 3 * pairs + 1, 3),
        keys=generator.integers(0, 2**64, (2 * pairs, 2), dtype=np.uint64),
        scores=np.full(2 * pairs, np.nan),
        origins=np.zeros((pairs, 2), dtype=np.int64),
    )


def scorable(dataset: PreferenceDataset) -> PreferenceDataset:
    """The same pairs with ids that differ, and their keys, as a fill demands."""
    ids = np.random.default_rng(1).integers(0, 100, len(dataset.ids)).astype(np.int32)
    dataset = replace(dataset, ids=ids)
    keys = [
        response_key(pair.prompt_ids, response)
        for pair in map(dataset.sequences, range(len(dataset)))
        for response in pair.responses
    ]
    return replace(dataset, keys=np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2))


def write(root: Path, dataset: PreferenceDataset, rows_per_shard: int) -> None:
    """A row of each response's length, made of its key, so that a wrong row is seen."""
    store = LogpStore.open(root, FINGERPRINT, [])
    lengths = np.asarray(dataset.piece_tokens).reshape(-1, 3)[:, 1:].ravel()
    for start in range(0, len(dataset.keys), rows_per_shard):
        keys = dataset.keys[start : start + rows_per_shard]
        numbers = marks(keys)
        rows = [np.full(n, v) for n, v in zip(lengths[start : start + len(keys)], numbers, strict=True)]
        store.write(keys, rows)


def marks(keys: Keys) -> np.ndarray:
    """float32 [n]: a value that tells most keys apart."""
    return (keys[:, 1] >> np.uint64(44)).astype(np.float32)


def lookups_per_second(store: LogpStore, dataset: PreferenceDataset, clock: Callable[[], float]) -> float:
    """Entries read at random in batches, warm, each compared with what was written."""
    places = np.random.default_rng(1).integers(0, len(dataset.keys), (4_000, LOOKUP_BATCH))
    batches = [dataset.keys[batch] for batch in places]
    for keys in batches:
        assert [row[0] for row in store.read(keys)] == marks(keys).tolist(), "the row of another key"
    started = clock()
    for keys in batches:
        store.read(keys)
    return places.size / (clock() - started)


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


@contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    figures[name] = time.perf_counter() - started


if __name__ == "__main__":
    main()
