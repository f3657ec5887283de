"""Measure how well the pairs of a step are spread over ranks and micro-batches, and what it costs to plan.

python -m benchmarks schedule [--budgets 2048 8192] [--data DIR] [--smoke] [--costs]

Lengths are those of hh_rlhf_sample.jsonl and ultrafeedback_plain_scored.jsonl in DIR (../shared/data), where
they are there, encoded by a tokenizer learnt from them, and invented ones; costs are those of a 40M model.
For each kind of lengths, budget, number of ranks, and pairs of each rank in a step:

    tokens      mean tokens of a rank in a step, in budgets
    fill        share of the token budget that is used
    bound       the same if micro-batches were as few as their number, a whole one, can be
    waiting     time of a step over the mean work of a rank, where ranks meet after every micro-batch
    least       no plan waits less: what the dearest pair alone makes ranks wait
    ranks       work of the busiest rank over the mean
    dummies     micro-batches without a pair in a step, of all ranks
    plan_ms     milliseconds of a processor to plan a step

Then the schedule of ten million pairs. With --costs instead what model/flops.py takes from it: the seconds of
forward and backward on micro-batches of very different shapes, explained by least squares as those of tokens,
targets, and keys attended to. The last line is the figures as JSON.
"""

import argparse
import itertools
import json
import math
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from benchmarks.assets import SHAPES, Shape
from dpo_dist.config.schema import AttentionBackend, DataConfig, Dtype, SourceConfig, TrainerConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.micro_batches import ComputeCosts, ExampleSizes, example_sizes, plan_micro_batches
from dpo_dist.data.packing import Ids, PackedBatch, Sequences, pack
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.data.sampler import Span, make_sampler
from dpo_dist.model import flops
from dpo_dist.model.attention import PACKED
from dpo_dist.model.attention_backend import choose_backend
from dpo_dist.model.flops import compute_costs, count_flops
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.load import TORCH_DTYPES

FILES = {"hh": "hh_rlhf_sample.jsonl", "ultrafeedback": "ultrafeedback_plain_scored.jsonl"}
SEPARATOR = "<|end|>"
# Prompt, each of two responses, pairs: from all prompt to all responses, from short to long.
COST_SHAPES = [
    (120, 4, 8),
    (512, 4, 2),
    (960, 32, 1),
    (2000, 8, 1),
    (32, 16, 16),
    (16, 112, 4),
    (4, 256, 2),
    (64, 480, 1),
    (8, 1000, 1),
    (3000, 500, 1),
]

Lengths = npt.NDArray[np.int64]  # [pairs, 3]: prompt, chosen, rejected


@dataclass(frozen=True)
class Quality:
    """Means over steps; the columns that the script's text explains."""

    lengths: str
    budget: int
    world_size: int
    pairs_per_rank: int
    tokens: float
    fill: float
    bound: float
    waiting: float
    least: float
    ranks: float
    dummies: float
    plan_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[TrainerConfig.micro_batch_tokens])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--smoke", action="store_true", help="seconds; checks that this script works")
    parser.add_argument("--costs", action="store_true", help="measure what the plan takes for granted")
    arguments = parser.parse_args()
    if arguments.costs:
        print(json.dumps({"costs": measure_costs(SHAPES["tiny" if arguments.smoke else "40m"])}))
        return
    worlds, limit, pairs = ((8,), 60, 100_000) if arguments.smoke else ((8, 64, 512), None, 10_000_000)
    rows = []
    print_row(Quality.__dataclass_fields__)
    costs = compute_costs(count_flops(config_of(SHAPES["40m"])))
    for name, lengths in kinds_of_lengths(arguments.data, limit):
        for budget, world_size, pairs_per_rank in itertools.product(arguments.budgets, worlds, (16, 64)):
            row = measure(name, lengths, costs, budget, world_size, pairs_per_rank)
            rows.append(asdict(row))
            print_row(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1].values())
    schedule = bench_schedule(pairs)
    for key, value in schedule.items():
        print(f"{key:<30} {value:,.4g}")
    print(json.dumps({"plans": rows, "schedule": schedule}))


def print_row(cells: Iterable[object]) -> None:
    print(" ".join(f"{cell!s:>14}" for cell in cells))


def measure(
    name: str, lengths: Lengths, prices: ComputeCosts, budget: int, world_size: int, pairs_per_rank: int
) -> Quality:
    """Plan steps of pairs drawn at random."""
    generator = np.random.default_rng(0)
    steps = []
    for _ in range(max(4, 640 // world_size)):
        drawn = generator.choice(lengths, world_size * pairs_per_rank)
        started = time.process_time()
        sizes = example_sizes(drawn[:, 0], drawn[:, 1:].ravel(), np.full(len(drawn), 2), prices)
        plan = plan_micro_batches(sizes, world_size, budget)
        seconds = time.process_time() - started
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
                least_waiting(sizes, world_size, budget),
                costs.sum(axis=0).max() / costs.sum(axis=0).mean(),
                (costs == 0).sum(),
                seconds * 1e3,
            )
        )
    return Quality(name, budget, world_size, pairs_per_rank, *np.mean(steps, axis=0).tolist())


def least_waiting(sizes: ExampleSizes, world_size: int, budget: int) -> float:
    """A lower bound: beside the dearest pair no rank can do more than fill its budget; the rest follows."""
    fullest = budget * (sizes.costs / sizes.tokens).max()
    dearest = np.sort(sizes.costs)[::-1]
    beside = np.maximum(dearest[:world_size], fullest).sum() + max(0, world_size - len(dearest)) * fullest
    whole = sizes.costs.sum()
    return float(max(1.0, (dearest[0] + max(0.0, whole - beside) / world_size) / (whole / world_size)))


def bench_schedule(pairs: int) -> dict[str, float]:
    """Seconds and memory until the first step's rows are known, and all rows of the run."""
    sampler = make_sampler([Span(0, pairs, 1.0)], TrainerConfig(epochs=1.5))
    figures: dict[str, float] = {"pairs": pairs}
    tracemalloc.start()
    works: dict[str, Callable[[], object]] = {
        "first_step": lambda: sampler.indices(0),
        "visited_indices": sampler.visited_indices,
    }
    for name, work in works.items():
        started = time.perf_counter()
        work()
        figures[f"{name}_seconds"] = time.perf_counter() - started
        figures[f"{name}_peak_gib"] = tracemalloc.get_traced_memory()[1] / 2**30
    tracemalloc.stop()
    started = time.perf_counter()
    for step in range(1, 101):
        sampler.indices(step)
    figures["step_microseconds"] = (time.perf_counter() - started) * 1e4
    return figures


def config_of(shape: Shape) -> Qwen2Config:
    heads = shape.hidden_size // 64
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        tie_word_embeddings=True,
    )


def measure_costs(shape: Shape) -> dict[str, float]:
    """Factors of model/flops.py, and the largest error of the seconds that they explain."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = Dtype.bf16 if device.type == "cuda" else Dtype.fp32
    backend = choose_backend(AttentionBackend.auto, dtype, device)
    config = config_of(shape)
    causal_lm = AutoModelForCausalLM.from_config(
        config, dtype=TORCH_DTYPES[dtype], attn_implementation=PACKED
    )
    model = PackedCausalLM(causal_lm.to(device), backend)
    parts, seconds = [], []
    for prompt, response, pairs in COST_SHAPES * 2:
        batch = random_batch(prompt, response, pairs, shape.vocabulary)
        keys = pairs * (prompt**2 / 2 + 2 * (response - 1) * (prompt + (response - 1) / 2))
        parts.append((batch.tokens, len(batch.targets), keys))
        seconds.append(seconds_of(model, batch.to(device)))
        print_row((prompt, response, pairs, f"{seconds[-1]:.4g}"))
    warm = len(COST_SHAPES)
    relative = np.array(parts[warm:]) / np.array(seconds[warm:])[:, None]
    (token, target, key), *_ = np.linalg.lstsq(relative, np.ones(warm), rcond=None)
    counted = compute_costs(count_flops(config))
    return {
        "microseconds_per_token": token * 1e6,
        "key": key / token,
        "target": target / token,
        "attention_slowness": key / token / counted.key * flops._ATTENTION_SLOWNESS,
        "head_slowness": target / token / counted.target * flops._HEAD_SLOWNESS,
        "largest_error": float(np.abs(relative @ (token, target, key) - 1).max()),
    }


def random_batch(prompt: int, response: int, pairs: int, vocabulary: int) -> PackedBatch:
    generator = np.random.default_rng(0)

    def ids(length: int) -> Ids:
        return generator.integers(vocabulary, size=length).astype(np.int32)

    sequences = [Sequences(ids(prompt), (ids(response), ids(response))) for _ in range(pairs)]
    return pack(sequences, np.zeros((2 * pairs, 2), dtype=np.uint64))


def seconds_of(model: PackedCausalLM, batch: PackedBatch) -> float:
    """Of forward and backward: of the processor on a CPU, which a loaded machine changes least."""
    clock = time.process_time
    if batch.targets.is_cuda:
        torch.cuda.synchronize()
        clock = time.perf_counter
    model.zero_grad()
    started = clock()
    model(batch).sum().backward()
    if batch.targets.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


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
    kept = [pair for pair in pairs if isinstance(pair, EncodedExample)]
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
