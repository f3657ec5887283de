"""Compare the speed and memory of dpo_dist with TRL's.

Both train with the same weights, token ids, order, batch, optimizer and precision; if their first steps
differ, the exit code is 1. Variants take turns, each in its own process. Times are those of training steps
and of scoring by the reference, without imports and loading; `whole` includes loading, and for dpo_dist also
checkpoint, exported model and report. Figures are ratios as [median, minimum, maximum] over rounds, and the
differences between the trainers.

    trl_default   the reference beside the policy, gradient checkpointing
    trl_best_N    reference log-probs computed before training, no gradient checkpointing, N pairs per
                  micro-batch: 1 pads only the shorter response of a pair, more pad to the longest sequence
    cold, warm    dpo_dist with an empty store, and with the store that the cold run filled
    cold_N        cold, on N processes with ZeRO-3 (--processes N)

The ratio of a warm run to trl_best excludes TRL's reference, because TRL can also keep log-probs.
"""

import json
import os
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from benchmarks.options import Benchmark, Json, markdown
from benchmarks.runs import Result, Run, in_fork, start
from benchmarks.setting import ORDER, Setting, default_data, prepare

Rounds = list[dict[str, Result]]

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def run(options: Namespace) -> Json:
    """Measure all variants."""
    setting = Setting.from_options(options)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        in_fork(lambda: prepare(setting, folder))
        rounds = [_round(folder, number, options) for number in range(options.rounds)]
        unique_tokens = json.loads((folder / ORDER).read_text())["unique_tokens"]
    print(f"{setting}\n{options.rounds} rounds, {options.threads} of {os.cpu_count()} cores; medians\n")
    print(markdown(_table(rounds, setting.pairs, unique_tokens)))
    differences = _differences(rounds)
    return {
        "trainers_agree": max(differences.values()) <= TOLERANCE[setting.dtype],
        "first_step_difference": differences,
        "largest_loss_difference": _largest_loss_difference(rounds),
        "ratios": _ratios(rounds),
    }


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--shared-prefix", type=float, default=0.7, help="the prompt's share (synthetic)")
    parser.add_argument("--mean-tokens", type=int, default=250, help="tokens of a sequence (synthetic)")
    parser.add_argument("--length-spread", type=float, default=0.7, help="sigma of lengths (synthetic)")
    parser.add_argument("--seed", type=int, default=0)


def _fault(options: Namespace) -> str:
    micro_batches = (options.trl_micro_pairs, *options.trl_best_micro_pairs)
    is_whole = options.pairs % options.batch_pairs == 0
    if is_whole and all(options.batch_pairs % micro == 0 for micro in micro_batches):
        return ""
    return "pairs must be a multiple of batch-pairs, and batch-pairs of TRL's micro-batches"


def _round(folder: Path, number: int, options: Namespace) -> dict[str, Result]:
    """Run every variant once; rounds alternate between TRL first and dpo_dist first."""
    store = folder / f"store-{number}"
    jobs = [("cold", "dpo_dist", store, 1), ("warm", "dpo_dist", store, 1)]
    for processes in sorted({*options.processes} - {1}):
        cold = folder / f"store-{processes}-{number}"
        jobs += [(f"cold_{processes}", "dpo_dist", cold, processes)]
        jobs += [(f"warm_{processes}", "dpo_dist", store, processes)]
    best = [f"trl_best_{pairs}" for pairs in options.trl_best_micro_pairs]
    trls = [(name, name, store, 1) for name in ("trl_default", *best)]
    jobs = [*jobs, *trls] if number % 2 else [*trls, *jobs]
    return {
        name: start(Run(str(folder), variant, str(store)), processes, options.threads)
        for name, variant, store, processes in jobs
    }


def _table(rounds: Rounds, pairs: int, unique_tokens: int) -> list[list[str]]:
    columns = "pairs/s, tokens/s, training s, reference s, CPU s, whole s, whole CPU s, peak MiB"
    rows = [["", *columns.split(", ")]]
    for name in rounds[0]:

        def median(value: Callable[[Result], float], name: str = name) -> float:
            return statistics.median(value(results[name]) for results in rounds)

        seconds = median(lambda result: _spent(result, "seconds"))
        values = (
            pairs / seconds,
            unique_tokens / seconds,
            median(lambda result: result["training"]["seconds"]),
            median(lambda result: result["reference"]["seconds"]),
            median(lambda result: _spent(result, "cpu_seconds")),
            median(lambda result: result["whole"]["seconds"]),
            median(lambda result: result["whole"]["cpu_seconds"]),
            median(lambda result: result["peak_bytes"] / 2**20),
        )
        rows.append([name, *(f"{value:.4g}" for value in values)])
    return rows


def _spent(result: Result, unit: str, reference: bool = True) -> float:
    spent: float = result["training"][unit]
    return spent + result["reference"][unit] if reference else spent


def _ratios(rounds: Rounds) -> dict[str, list[float]]:
    """Return [median, minimum, maximum] over rounds of TRL's time / ours, and of our memory / TRL's."""
    trls = [name for name in rounds[0] if name.startswith("trl")]
    ratios = {}
    for name in rounds[0].keys() - trls:
        for trl in trls:
            counts_reference = trl == "trl_default" or name.startswith("cold")
            for unit in ("seconds", "cpu_seconds"):
                ratios[f"{name}/{trl}/{unit}"] = [
                    _spent(results[trl], unit, counts_reference) / _spent(results[name], unit)
                    for results in rounds
                ]
            ratios[f"{name}/{trl}/peak_memory"] = [
                results[name]["peak_bytes"] / results[trl]["peak_bytes"] for results in rounds
            ]
    return {
        name: [round(value, 3) for value in (statistics.median(values), min(values), max(values))]
        for name, values in sorted(ratios.items())
    }


def _differences(rounds: Rounds) -> dict[str, float]:
    """Return the largest differences of first steps from TRL's defaults: relative, for the loss absolute."""
    first = {
        name: [result["rows"][0][name] for results in rounds for result in results.values()]
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm")
    }
    wanted = {name: rounds[0]["trl_default"]["rows"][0][name] for name in first}
    return {
        name: max(abs(value - wanted[name]) for value in values)
        / (1 if name == "loss" else abs(wanted[name]))
        for name, values in first.items()
    }


def _largest_loss_difference(rounds: Rounds) -> float:
    """Return the largest difference of a step's loss from that of TRL's defaults."""
    losses: list[list[float]] = [
        [row["loss"] for row in result["rows"]] for results in rounds for result in results.values()
    ]
    wanted: list[float] = [row["loss"] for row in rounds[0]["trl_default"]["rows"]]
    return max(abs(a - b) for run in losses for a, b in zip(run, wanted, strict=True))


BENCHMARK = Benchmark(
    run,
    shared={
        "model": "40m",
        "data": default_data(),
        "pairs": 32,
        "batch_pairs": 16,
        "max_length": 1024,
        "dtype": "fp32",
        "rounds": 2,
        "threads": os.cpu_count(),
        "processes": [1],
        "micro_batch_tokens": 4096,
        "trl_micro_pairs": 8,
        "trl_best_micro_pairs": [1],
    },
    own=_own_options,
    smoke={
        "model": "tiny",
        "data": "synthetic",
        "pairs": 8,
        "batch_pairs": 4,
        "trl_micro_pairs": 2,
        "mean_tokens": 24,
        "rounds": 1,
    },
    fault=_fault,
)
