"""Measure the share of the device's peak that training uses.

Runs the whole program, except checkpoints and the exported model, with random weights of real shapes, real
lengths and a cached reference. A variant is options joined by `+`, and runs in its own process. mfu counts
each unique token and each operation once, relative to products of large matrices in the same process. The
medians exclude the first steps, in which kernels are chosen and compiled.

Weights, gradients, master weights and Adam's states take about 20 bytes per parameter: the 7B shape with all
its 28 layers does not fit on one GPU of 140 GB. Use fewer layers, which are alike, or --offload-optimizer.
"""

import json
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

from benchmarks.options import Benchmark, Json, markdown
from benchmarks.runs import Result, Run, RunFailedError, in_fork, start
from benchmarks.setting import SHAPES, Setting, default_data, prepare

OPTIONS = {
    "plain": [],
    "sdpa": ["model.attention=sdpa"],
    "varlen": ["model.attention=varlen"],
    "flash": ["model.attention=flash_attention_2"],
    "full": ["model.gradient_checkpointing=full"],
    "every2": ["model.gradient_checkpointing=2"],
    "every4": ["model.gradient_checkpointing=4"],
    "none": ["model.fused=none"],
    "liger": ["model.fused=liger"],
    "compile": ["model.fused=compile"],
    "zero2": ["parallelism.kind=zero2"],
    "zero3": ["parallelism.kind=zero3"],
    "lora": ["model.adapter.r=64", "model.adapter.target_modules=all-linear", "reference=adapter"],
}
MEDIANS = ("mfu", "tokens_per_second", "pairs_per_second", "step_seconds")


def run(options: Namespace) -> Json:
    """Measure all variants."""
    mean_tokens = 24 if options.smoke else 400
    pairs = options.steps * options.batch_pairs
    setting = Setting.from_options(options, pairs=pairs, mean_tokens=mean_tokens)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        in_fork(lambda: prepare(setting, folder))
        results: dict[str, Result] = {}
        for variant in options.variants:
            results[variant] = _measure(variant, folder, options)
            print(variant, json.dumps(results[variant]), flush=True)
        if options.trl:
            for variant in ("trl_default", *(f"trl_best_{pairs}" for pairs in options.trl_best_micro_pairs)):
                results[variant] = _measure_trl(variant, setting, folder, options.warm_up)
                print(variant, json.dumps(results[variant]), flush=True)
    layers = setting.layers or SHAPES[setting.model].layers
    print(f"{setting.model} with {layers} of {SHAPES[setting.model].layers} layers, {setting}\n")
    print(markdown(_table(results)))
    return {"setting": vars(setting), "layers": layers, "variants": results}


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, help="number of layers, to use fewer than the shape has")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="number of first steps that are not measured")
    parser.add_argument("--variants", nargs="+", default=["plain", "none", "compile", "full", "sdpa"])
    parser.add_argument(
        "--offload-optimizer", action="store_true", help="keep optimizer states in host memory, with zero2"
    )
    parser.add_argument("--trl", action="store_true", help="also measure TRL on the same pairs")


def _fault(options: Namespace) -> str:
    unknown = {option for variant in options.variants for option in variant.split("+")} - OPTIONS.keys()
    if unknown:
        return f"unknown options {sorted(unknown)}; known are {', '.join(OPTIONS)}"
    return "" if options.warm_up < options.steps else "no step is left to measure"


def _measure(variant: str, folder: Path, options: Namespace) -> Result:
    """Return medians over the measured steps, or why the run failed (memory, for example)."""
    chosen = ["optim.lr=1e-6", *(override for option in variant.split("+") for override in OPTIONS[option])]
    if options.offload_optimizer:
        chosen += ["parallelism.kind=zero2", "parallelism.offload_optimizer=cpu"]
    try:
        measured = start(Run(str(folder), "dpo_dist", str(folder / "store"), tuple(chosen), saves=False))
    except RunFailedError as failure:
        return {"failed": str(failure)}
    rows, summary = measured["rows"][options.warm_up :], measured["summary"]
    return {
        **{name: statistics.median(row[name] for row in rows) for name in MEDIANS},
        "peak_bytes": summary["peak_memory_bytes"],
        "reserved_bytes": measured["reserved_bytes"],
        "reference_seconds": summary["reference"]["seconds"],
        "loss": [row["loss"] for row in rows],
    }


def _measure_trl(variant: str, setting: Setting, folder: Path, warm_up: int) -> Result:
    """Return TRL's medians over the same steps; the time between two steps counts, too."""
    try:
        measured = start(Run(str(folder), variant, str(folder / "store")))
    except RunFailedError as failure:
        return {"failed": str(failure)}
    seconds = statistics.median(measured["step_seconds"][warm_up:])
    return {
        "pairs_per_second": setting.batch_pairs / seconds,
        "step_seconds": seconds,
        "peak_bytes": measured["peak_bytes"],
        "reserved_bytes": measured["reserved_bytes"],
        "reference_seconds": measured["reference"]["seconds"],
    }


def _table(results: dict[str, Result]) -> list[list[str]]:
    rows = [["", "mfu", "tokens/s", "pairs/s", "s a step", "peak GiB", "reserved", "reference, s"]]
    for variant, result in results.items():
        if "failed" in result:
            rows.append([variant, f"failed: {result['failed'].strip().splitlines()[-1][:80]}", *[""] * 6])
            continue
        values = [result.get(name, float("nan")) for name in MEDIANS]
        values += [
            result["peak_bytes"] / 2**30,
            result["reserved_bytes"] / 2**30,
            result["reference_seconds"],
        ]
        rows.append([variant, f"{values[0]:.1%}", *(f"{value:.4g}" for value in values[1:])])
    return rows


BENCHMARK = Benchmark(
    run,
    shared={
        "model": "1.5b",
        "data": default_data(),
        "batch_pairs": 64,
        "max_length": 2048,
        "micro_batch_tokens": 16384,
        "dtype": "bf16",
        "trl_micro_pairs": 8,
        "trl_best_micro_pairs": [8],
    },
    own=_own_options,
    smoke={
        "model": "tiny",
        "data": "synthetic",
        "steps": 3,
        "warm_up": 1,
        "batch_pairs": 4,
        "dtype": "fp32",
        "max_length": 256,
        "variants": ["plain", "full", "every2"],
        "trl_micro_pairs": 2,
        "trl_best_micro_pairs": [2],
    },
    fault=_fault,
)
