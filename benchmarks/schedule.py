"""Measure how evenly the pairs of a step are spread over ranks and micro-batches, and the cost of planning.

Lengths are those of slices of real data where they exist, encoded by a tokenizer trained on them, and
invented ones; costs are those of a 40M model. For each kind of lengths, budget, number of ranks, and pairs of
each rank in a step:

    tokens      mean tokens of a rank in a step, in budgets
    fill        used share of the token budget
    bound       the same if the number of micro-batches were the smallest possible one
    waiting     time of a step over the mean work of a rank, where ranks meet after every micro-batch
    least       lower bound of waiting: the most expensive pair alone makes ranks wait
    ranks       work of the busiest rank over the mean
    dummies     micro-batches without a pair in a step, of all ranks
    plan_ms     CPU milliseconds to plan a step

Then the schedule of ten million pairs. With --costs instead the constants of model/flops.py: the seconds of
forward and backward on micro-batches of very different shapes, explained by least squares as those of tokens,
targets, and keys attended to.
"""

import itertools
import math
import time
import tracemalloc
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from benchmarks.options import Benchmark, Json
from benchmarks.setting import REAL_DATA, SHAPES, Shape, model_config, shared_data, train_tokenizer
from benchmarks.tables import markdown
from dpo_dist.batching.pack import Ids, PackedBatch, Sequences, pack
from dpo_dist.batching.plan import ComputeCosts, ExampleSizes, example_sizes, plan_micro_batches
from dpo_dist.batching.sampler import Span, make_sampler
from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.schema import AttentionBackend, Dtype, TrainerConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.model import flops
from dpo_dist.model.attention import PACKED, choose_backend
from dpo_dist.model.flops import compute_costs, count_flops
from dpo_dist.model.load import TORCH_DTYPES
from dpo_dist.model.packed import PackedCausalLM

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


QUALITIES = ("tokens", "fill", "bound", "waiting", "least", "ranks", "dummies", "plan_ms")


def run(options: Namespace) -> Json:
    """Measure plans and the schedule, or the costs that plans assume."""
    if options.costs:
        return {"costs": _measure_costs(SHAPES["tiny" if options.smoke else "40m"])}
    worlds, limit, pairs = ((8,), 60, 100_000) if options.smoke else ((8, 64, 512), None, 10_000_000)
    costs = compute_costs(count_flops(model_config(SHAPES["40m"])))
    plans = []
    for name, lengths in _kinds_of_lengths(limit):
        for budget, world_size, pairs_per_rank in itertools.product(options.budgets, worlds, (16, 64)):
            where = {
                "lengths": name,
                "budget": budget,
                "world_size": world_size,
                "pairs_per_rank": pairs_per_rank,
            }
            plans.append(where | _measure(lengths, costs, budget, world_size, pairs_per_rank))
    schedule = _measure_schedule(pairs)
    print(markdown([list(plans[0]), *([_cell(value) for value in plan.values()] for plan in plans)]))
    print(markdown([["schedule", ""], *([key, _cell(value)] for key, value in schedule.items())]))
    return {"plans": plans, "schedule": schedule}


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--budgets", type=int, nargs="+", default=[TrainerConfig.micro_batch_tokens])
    parser.add_argument("--costs", action="store_true", help="measure the costs that plans assume")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _measure(
    lengths: Lengths, costs: ComputeCosts, budget: int, world_size: int, pairs_per_rank: int
) -> Json:
    """Plan steps of pairs drawn at random. Return the means of their qualities."""
    generator = np.random.default_rng(0)
    steps = []
    for _ in range(max(4, 640 // world_size)):
        drawn = generator.choice(lengths, world_size * pairs_per_rank)
        started = time.process_time()
        sizes = example_sizes(drawn[:, 0], drawn[:, 1:].ravel(), np.full(len(drawn), 2), costs)
        plan = plan_micro_batches(sizes, world_size, budget)
        seconds = time.process_time() - started
        work = np.array([[sizes.costs[indices].sum() for indices in ranks] for ranks in plan])
        capacity = world_size * budget
        tokens = sizes.tokens.sum() / capacity
        least = math.ceil(np.minimum(sizes.tokens, budget).sum() / capacity)
        steps.append(
            (
                tokens,
                tokens / len(plan),
                tokens / least,
                work.max(axis=1).sum() / work.sum(axis=0).mean(),
                _least_waiting(sizes, world_size, budget),
                work.sum(axis=0).max() / work.sum(axis=0).mean(),
                (work == 0).sum(),
                seconds * 1e3,
            )
        )
    return dict(zip(QUALITIES, np.mean(steps, axis=0).tolist(), strict=True))


def _least_waiting(sizes: ExampleSizes, world_size: int, budget: int) -> float:
    """Return a lower bound of waiting: beside the most expensive pair a rank can at most fill its budget."""
    fullest = budget * (sizes.costs / sizes.tokens).max()
    by_cost = np.sort(sizes.costs)[::-1]
    beside = np.maximum(by_cost[:world_size], fullest).sum() + max(0, world_size - len(by_cost)) * fullest
    whole = sizes.costs.sum()
    return float(max(1.0, (by_cost[0] + max(0.0, whole - beside) / world_size) / (whole / world_size)))


def _measure_schedule(pairs: int) -> dict[str, float]:
    """Return seconds and memory until the indices of the first step are known, and those of the run."""
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


def _measure_costs(shape: Shape) -> dict[str, float]:
    """Return the factors of model/flops.py, and the largest error of the seconds that they explain."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = Dtype.bf16 if device.type == "cuda" else Dtype.fp32
    backend = choose_backend(AttentionBackend.auto, dtype, device)
    config = model_config(shape)
    causal_lm = AutoModelForCausalLM.from_config(
        config, dtype=TORCH_DTYPES[dtype], attn_implementation=PACKED
    )
    model = PackedCausalLM(causal_lm.to(device), backend)
    parts, seconds = [], []
    for prompt, response, pairs in COST_SHAPES * 2:
        batch = _random_batch(prompt, response, pairs, shape.vocabulary)
        keys = pairs * (prompt**2 / 2 + 2 * (response - 1) * (prompt + (response - 1) / 2))
        parts.append((batch.tokens, len(batch.targets), keys))
        seconds.append(_seconds_of(model, batch.to(device)))
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


def _random_batch(prompt: int, response: int, pairs: int, vocabulary: int) -> PackedBatch:
    generator = np.random.default_rng(0)

    def ids(length: int) -> Ids:
        return generator.integers(vocabulary, size=length).astype(np.int32)

    sequences = [Sequences(ids(prompt), (ids(response), ids(response))) for _ in range(pairs)]
    return pack(sequences, np.zeros((2 * pairs, 2), dtype=np.uint64))


def _seconds_of(model: PackedCausalLM, batch: PackedBatch) -> float:
    """Return seconds of forward and backward; on a CPU CPU seconds, which load changes least."""
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


def _kinds_of_lengths(limit: int | None) -> Iterator[tuple[str, Lengths]]:
    """Yield names and lengths, real and invented."""
    generator = np.random.default_rng(0)
    for name, file in REAL_DATA.items():
        if (shared_data() / file).is_file():
            yield name, _real_lengths(shared_data() / file, limit)
    yield "uniform", generator.integers(20, 500, (4_000, 3))
    yield "long-tailed", np.clip(np.exp(generator.normal(5, 1, (4_000, 3))), 4, 2_000).astype(np.int64)


def _real_lengths(file: Path, limit: int | None) -> Lengths:
    """Return lengths of the pairs of a file, encoded as for training."""
    records = [
        r for r in read_records(SourceConfig(str(file), limit=limit)) if isinstance(r, PreferenceRecord)
    ]
    tokenizer = train_tokenizer(file, 8_000)
    pairs = [encode_pair(record, tokenizer, DataConfig()) for record in records]
    kept = [pair for pair in pairs if isinstance(pair, EncodedExample)]
    return np.array([[len(pair.prompt_ids), *map(len, pair.responses)] for pair in kept])


BENCHMARK = Benchmark(run, own=_own_options)
