"""Compare a script of TRL with the same script by our import, at TRL's defaults, and with our own run.

All train with the same weights, token ids, order, batch, optimizer and precision; if first losses differ,
the exit code is 1. Variants take turns, each in its own process. Seconds are CPU seconds of steps and scoring
by the reference, without imports and loading; ratios are [median, minimum, maximum] over rounds.

    trl_default   TRL
    guest         the same by our import, with an empty store
    guest_beta    again with another beta, and the store of `guest`
    dpo_dist      our own run, with an empty store
"""

import os
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.options import Benchmark, Json, markdown
from benchmarks.runs import Result, Run, in_fork, start
from benchmarks.setting import Setting, default_data, prepare

VARIANTS = ("trl_default", "guest", "guest_beta", "dpo_dist")
_TOLERANCE = 1e-4


def run(options: Namespace) -> Json:
    """Measure all variants."""
    setting = Setting.from_options(options)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        in_fork(lambda: prepare(setting, folder))
        rounds = [_round(folder, number, options.threads) for number in range(options.rounds)]
    print(f"{setting}\n{options.rounds} rounds, {options.threads} of {os.cpu_count()} cores; medians\n")
    seconds = {name: [_seconds(results[name]) for results in rounds] for name in VARIANTS}
    peaks = {name: [results[name]["peak_bytes"] / 2**20 for results in rounds] for name in VARIANTS}
    rows = [["", "CPU s", "peak MiB"]]
    for name in VARIANTS:
        rows.append([name, *(f"{statistics.median(of[name]):.4g}" for of in (seconds, peaks))])
    print(markdown(rows))
    ratios = {}
    for name in VARIANTS[1:]:
        of_rounds = [trl / own for trl, own in zip(seconds["trl_default"], seconds[name], strict=True)]
        ratios[name] = [round(pick(of_rounds), 3) for pick in (statistics.median, min, max)]
    losses = [results[name]["rows"][0]["loss"] for results in rounds for name in VARIANTS]
    return {
        "trainers_agree": max(losses) - min(losses) <= _TOLERANCE,
        "cpu_seconds": seconds,
        "peak_mib": peaks,
        "trl_per_variant": ratios,
    }


def _round(folder: Path, number: int, threads: int) -> dict[str, Result]:
    """Run every variant once; the second run of the guest finds the store of the first."""
    stores = {name: str(folder / f"store-{number}-{name.partition('_')[0]}") for name in VARIANTS}
    return {name: start(Run(str(folder), name, store), threads=threads) for name, store in stores.items()}


def _seconds(result: Result) -> float:
    seconds: float = result["training"]["cpu_seconds"] + result["reference"]["cpu_seconds"]
    return seconds


BENCHMARK = Benchmark(
    run,
    shared={
        "model": "5m",
        "data": default_data(),
        "pairs": 64,
        "batch_pairs": 16,
        "max_length": 1024,
        "dtype": "fp32",
        "rounds": 3,
        "threads": 1,
        "micro_batch_tokens": 4096,
        "trl_micro_pairs": 8,
    },
    smoke={
        "model": "tiny",
        "data": "synthetic",
        "pairs": 8,
        "batch_pairs": 4,
        "trl_micro_pairs": 2,
        "rounds": 1,
    },
)
