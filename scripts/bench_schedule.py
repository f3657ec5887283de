"""Measure how well the pairs of a step are spread over ranks and micro-batches, and what it costs to plan.

python scripts/bench_schedule.py [--budget 8192] [--data DIR] [--smoke]

Lengths are those of hh_rlhf_sample.jsonl and ultrafeedback_plain_scored.jsonl in DIR (../shared/data), where
they are there, encoded by a tokenizer learnt from them, and invented ones. For each kind of lengths, number
of ranks, and pairs of each rank in a step:

    tokens      mean tokens of a rank in a step, in budgets
    fill        share of the token budget that is used
    bound       the same if micro-batches were as few as their number, a whole one, can be
    waiting     time of a step over the mean work of a rank, where ranks meet after every micro-batch
    ranks       work of the busiest rank over the mean
    dummies     micro-batches without a pair, share of all
    plan_ms     milliseconds to plan a step

Then the schedule of ten million pairs. The last line is the figures as JSON.
"""

import argparse
import json
import math
import sys
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_dist.config.schema import DataConfig, SourceConfig, TrainerConfig
from dpo_dist.data.encode import EncodedPair, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.pack import PairSizes, pair_sizes, plan_micro_batches
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.data.schedule import Span, make_schedule

FILES = {"hh": "hh_rlhf_sample.jsonl", "ultrafeedback": "ultrafeedback_plain_scored.jsonl"}
SEPARATOR = "<|end|>"

Lengths = npt.NDArray[np.int64]  # [pairs, 3]: prompt, chosen, rejected


@dataclass(frozen=True)
class Quality:
    """Means over steps; the columns that the script's text explains."""

    lengths: str
    world_size: int
    pairs_per_rank: int
    tokens: float
    fill: float
    bound: float
    waiting: float
    ranks: float
    dummies: float
    plan_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=int, default=TrainerConfig.micro_batch_tokens)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--smoke", action="store_true", help="seconds; checks that this script works")
    arguments = parser.parse_args()
    worlds, limit, pairs = ((8,), 60, 100_000) if arguments.smoke else ((8, 64, 512), None, 10_000_000)
    rows = []
    print_row(Quality.__dataclass_fields__)
    for name, lengths in kinds_of_lengths(arguments.data, limit):
        for world_size in worlds:
            for pairs_per_rank in (16, 64):
                row = measure(name, lengths, world_size, pairs_per_rank, arguments.budget)
                rows.append(asdict(row))
                print_row(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1].values())
    schedule = bench_schedule(pairs)
    for key, value in schedule.items():
        print(f"{key:<30} {value:,.4g}")
    print(json.dumps({"plans": rows, "schedule": schedule}))


def print_row(cells: Iterable[object]) -> None:
    print(" ".join(f"{cell!s:>14}" for cell in cells))


def measure(name: str, lengths: Lengths, world_size: int, pairs_per_rank: int, budget: int) -> Quality:
    """Plan steps of pairs drawn at random."""
    generator = np.random.default_rng(0)
    steps = []
    for _ in range(max(4, 640 // world_size)):
        drawn = generator.choice(lengths, world_size * pairs_per_rank)
        started = time.perf_counter()
        sizes = sizes_of(drawn)
        plan = plan_micro_batches(sizes, world_size, budget)
        seconds = time.perf_counter() - started
        costs = np.array([[sizes.costs[places].sum() for places in ranks] for ranks in plan])
        capacity = world_size * budget
        tokens = sizes.tokens.sum() / capacity
        least = math.ceil(np.minimum(sizes.tokens, budget).sum() / capacity)
        steps.append(
            (
                tokens,
                tokens / len(plan),
                tokens / least,
                costs.max(axis=1).sum() / costs.sum(axis=0).mean(),
                costs.sum(axis=0).max() / costs.sum(axis=0).mean(),
                (costs == 0).mean(),
                seconds * 1e3,
            )
        )
    return Quality(name, world_size, pairs_per_rank, *np.mean(steps, axis=0).tolist())


def bench_schedule(pairs: int) -> dict[str, float]:
    """Seconds and memory until the first step's rows are known, and all rows of the run."""
    schedule = make_schedule([Span(0, pairs, 1.0)], TrainerConfig(epochs=1.5))
    figures: dict[str, float] = {"pairs": pairs}
    tracemalloc.start()
    for name, work in (("first_step", lambda: schedule.rows(0)), ("all_rows", schedule.all_rows)):
        started = time.perf_counter()
        work()
        figures[f"{name}_seconds"] = time.perf_counter() - started
        figures[f"{name}_peak_gib"] = tracemalloc.get_traced_memory()[1] / 2**30
    tracemalloc.stop()
    started = time.perf_counter()
    for step in range(1, 101):
        schedule.rows(step)
    figures["step_microseconds"] = (time.perf_counter() - started) * 1e4
    return figures


def sizes_of(lengths: Lengths) -> PairSizes:
    return pair_sizes(lengths[:, 0], lengths[:, 1:].ravel(), np.full(len(lengths), 2))


def kinds_of_lengths(data: Path, limit: int | None) -> Iterator[tuple[str, Lengths]]:
    """Names and lengths, real and invented."""
    generator = np.random.default_rng(0)
    for name, file in FILES.items():
        if (data / file).is_file():
            yield name, real_lengths(data / file, limit)
    yield "uniform", generator.integers(20, 500, (4_000, 3))
    yield "long-tailed", np.clip(np.exp(generator.normal(5, 1, (4_000, 3))), 4, 2_000).astype(np.int64)


def real_lengths(file: Path, limit: int | None) -> Lengths:
    """Lengths of the pairs of a file, encoded as training encodes them."""
    records = [
        r for r in read_records(SourceConfig(str(file), limit=limit)) if isinstance(r, PreferenceRecord)
    ]
    tokenizer = learn_tokenizer([text for record in records for text in record.responses])
    pairs = [encode_pair(record, tokenizer, DataConfig()) for record in records]
    kept = [pair for pair in pairs if isinstance(pair, EncodedPair)]
    return np.array([[len(pair.prompt_ids), *map(len, pair.responses)] for pair in kept])


def learn_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 8,000 pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8_000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[SEPARATOR],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR, pad_token=SEPARATOR)


if __name__ == "__main__":
    main()
