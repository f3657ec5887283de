"""Measure packed attention on a CPU: forward and backward of one layer, for each kind of scores.

A prompt and responses of given lengths, 4 query heads in 2 groups of 64 dimensions. Kinds take turns, each
round in a process of its own, with one thread. Columns:

    forward, backward   median seconds
    ratio               median over rounds of both together, divided by full attention's of the same round
    peak                median MiB by which the peak of the resident set grows
"""

import multiprocessing
import resource
import statistics
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from benchmarks.options import Benchmark, Json
from benchmarks.tables import markdown
from dpo_dist.config.schema import AttentionBackend
from dpo_dist.model.attention import packed_attention
from dpo_dist.model.sdpa import Layout, Scores, mask_rule

HEADS, KEY_HEADS, DIM = 4, 2, 64


@dataclass(frozen=True)
class Kind:
    """One kind of scores: a window in tokens, a cap, sinks, the dimension of values."""

    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    value_dim: int = DIM


KINDS = {
    "full": Kind(),
    "window 2048": Kind(window=2048),
    "window 512": Kind(window=512),
    "sinks": Kind(has_sinks=True),
    "capped": Kind(softcap=30.0),
    "capped, window 512": Kind(window=512, softcap=30.0),
    "values of 48 dimensions": Kind(value_dim=48),
}


def run(options: Namespace) -> Json:
    """Measure all kinds."""
    layout: Layout = (tuple(options.lengths),)
    rounds: list[dict[str, list[float]]] = []
    for _ in range(options.rounds):
        measured = {}
        for name, kind in KINDS.items():
            with multiprocessing.get_context("fork").Pool(1) as pool:
                measured[name] = pool.apply(_measure, (layout, kind))
        rounds.append(measured)
    figures = {name: _medians(name, rounds) for name in KINDS}
    rows = [[name, *(f"{value:.3g}" for value in values.values())] for name, values in figures.items()]
    print(markdown([["kind", *figures["full"]], *rows]))
    return {"lengths": options.lengths, "kinds": figures}


def _medians(name: str, rounds: list[dict[str, list[float]]]) -> dict[str, float]:
    forward, backward, peak = (
        statistics.median(column) for column in zip(*(measured[name] for measured in rounds), strict=True)
    )
    ratio = statistics.median(sum(measured[name][:2]) / sum(measured["full"][:2]) for measured in rounds)
    return {"forward": forward, "backward": backward, "ratio": ratio, "peak": peak}


def _measure(layout: Layout, kind: Kind) -> list[float]:
    """Return the seconds of forward and of backward, and the MiB of the peak."""
    torch.set_num_threads(1)
    tokens, rule = sum(map(sum, layout)), None
    if kind.window is not None:
        rule = mask_rule(sliding_window_causal_mask_function(kind.window), kind.window)
    shapes = [(HEADS, DIM), (KEY_HEADS, DIM), (KEY_HEADS, kind.value_dim)]
    query, key, value = (torch.randn(tokens, *shape, requires_grad=True) for shape in shapes)
    sinks = torch.zeros(HEADS, requires_grad=True) if kind.has_sinks else None
    scores = Scores(rule=rule, window=kind.window, softcap=kind.softcap, sinks=sinks)
    before = _peak()
    started = time.perf_counter()
    attended = packed_attention(layout, AttentionBackend.sdpa, torch.device("cpu"))(query, key, value, scores)
    middle = time.perf_counter()
    attended.sum().backward()  # type: ignore[no-untyped-call]
    return [middle - started, time.perf_counter() - middle, _peak() - before]


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 4096, 4096], help="prompt, responses"
    )


BENCHMARK = Benchmark(run, {"rounds": 3}, _own_options, {"rounds": 1, "lengths": [64, 64, 64]})
