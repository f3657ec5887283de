"""Compare the speed and memory of dpo_dist with TRL's: `python -m benchmarks vs_trl`.

Same weights, token ids, order, batch, optimizer and precision; the first step must agree. Variants take
turns, each in a process of its own. Times are of training steps and of scoring by the reference, without
imports and loading; `whole` is with loading, and for dpo_dist with checkpoint, exported model and report.
The last line is JSON: ratios as [median, least, most] of the rounds, and how far the trainers lie apart.

    trl_default   the reference beside the policy, gradient checkpointing
    trl_best_N    reference values computed before training, no gradient checkpointing, N pairs a micro-batch:
                  1 pads only the shorter response of a pair, more pad to the longest sequence among them
    cold, warm    dpo_dist with an empty store, and with the store that the cold run filled

A ratio to trl_best leaves its reference out where ours is warm: TRL too can keep the values.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.assets import REAL_DATA, SHAPES, Setting, prepare, shared_data
from benchmarks.child import Result, in_fork, run_variant

Rounds = list[dict[str, Result]]

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def main() -> int:
    arguments = _arguments()
    setting = _setting(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        in_fork(lambda: prepare(setting, folder))
        rounds = [_round(folder, number, arguments) for number in range(arguments.rounds)]
        unique_tokens = json.loads((folder / "order.json").read_text())["unique_tokens"]
    print(setting)
    print(f"{arguments.rounds} rounds, {arguments.threads} of {os.cpu_count()} cores; medians of rounds")
    _print_table(rounds, setting.pairs, unique_tokens)
    differences = _differences(rounds)
    told = {
        "first_step_difference": differences,
        "largest_loss_difference": _largest_loss_difference(rounds),
        "ratios": _ratios(rounds),
    }
    print(json.dumps(told))
    return 0 if max(differences.values()) <= TOLERANCE[setting.dtype] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_data = (shared_data() / REAL_DATA["hh"]).is_file()
    parser.add_argument("--model", choices=SHAPES, default="40m")
    parser.add_argument(
        "--data", choices=(*REAL_DATA, "synthetic"), default="hh" if has_data else "synthetic"
    )
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch-pairs", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", choices=TOLERANCE, default="fp32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="2 adds ZeRO-3 on two")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all processes of a variant")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--trl-micro-pairs", type=int, default=8, help="8 is TRL's default")
    parser.add_argument("--trl-best-micro-pairs", type=int, nargs="+", default=[1])
    parser.add_argument("--shared-prefix", type=float, default=0.7)
    parser.add_argument("--mean-tokens", type=int, default=250)
    parser.add_argument("--length-spread", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where temporary files go")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(
            model="tiny",
            data="synthetic",
            pairs=8,
            batch_pairs=4,
            trl_micro_pairs=2,
            mean_tokens=24,
            rounds=1,
        )
    whole_batches = [(arguments.pairs, arguments.batch_pairs)]
    whole_batches += [
        (arguments.batch_pairs, micro)
        for micro in (arguments.trl_micro_pairs, *arguments.trl_best_micro_pairs)
    ]
    if any(total % part for total, part in whole_batches):
        parser.error("pairs must be a multiple of batch-pairs, and that of TRL's micro-batches")
    return arguments


def _setting(arguments: argparse.Namespace) -> Setting:
    names = Setting.__dataclass_fields__
    return Setting(**{name: value for name, value in vars(arguments).items() if name in names})


def _round(folder: Path, number: int, arguments: argparse.Namespace) -> dict[str, Result]:
    """Every variant once; which trainer goes first alternates."""
    store = folder / f"store-{number}"
    jobs = [("cold", "dpo_dist", store, 1), ("warm", "dpo_dist", store, 1)]
    if arguments.processes > 1:
        jobs += [("cold_2", "dpo_dist", folder / f"store-2-{number}", 2), ("warm_2", "dpo_dist", store, 2)]
    best = [f"trl_best_{pairs}" for pairs in arguments.trl_best_micro_pairs]
    trls = [(name, name, store, 1) for name in ("trl_default", *best)]
    jobs = [*jobs, *trls] if number % 2 else [*trls, *jobs]
    return {
        name: run_variant(folder, variant, store, processes, arguments.threads)
        for name, variant, store, processes in jobs
    }


def _print_table(rounds: Rounds, pairs: int, unique_tokens: int) -> None:
    print(
        f"{'':12} {'pairs/s':>8} {'tokens/s':>9} {'training':>9} {'reference':>9} {'CPU s':>7} "
        f"{'whole':>7} {'CPU s':>7} {'peak MiB':>8}"
    )
    for name in rounds[0]:

        def median(value: Callable[[Result], float], name: str = name) -> float:
            return statistics.median(value(results[name]) for results in rounds)

        seconds = median(lambda result: _spent(result, "seconds"))
        print(
            f"{name:12} {pairs / seconds:8.2f} {unique_tokens / seconds:9.0f} "
            f"{median(lambda result: result['training']['seconds']):8.1f}s "
            f"{median(lambda result: result['reference']['seconds']):8.1f}s "
            f"{median(lambda result: _spent(result, 'cpu_seconds')):7.1f} "
            f"{median(lambda result: result['whole']['seconds']):6.1f}s "
            f"{median(lambda result: result['whole']['cpu_seconds']):7.1f} "
            f"{median(lambda result: result['peak_bytes'] / 2**20):8.0f}"
        )


def _spent(result: Result, unit: str, reference: bool = True) -> float:
    spent: float = result["training"][unit]
    return spent + result["reference"][unit] if reference else spent


def _ratios(rounds: Rounds) -> dict[str, list[float]]:
    """[median, least, most] over rounds: how many times TRL's time ours is, and our share of its memory."""
    trls = [name for name in rounds[0] if name.startswith("trl")]
    ours = [name for name in rounds[0] if name not in trls]
    ratios = {}
    for name in ours:
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
        for name, values in ratios.items()
    }


def _differences(rounds: Rounds) -> dict[str, float]:
    """How far first steps lie from that of TRL's defaults: the loss absolutely, the rest relatively."""
    first = {
        name: [result["curves"][name][0] for results in rounds for result in results.values()]
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm")
    }
    wanted = {name: rounds[0]["trl_default"]["curves"][name][0] for name in first}
    return {
        name: max(abs(value - wanted[name]) for value in values)
        / (1 if name == "loss" else abs(wanted[name]))
        for name, values in first.items()
    }


def _largest_loss_difference(rounds: Rounds) -> float:
    """Of any later step: what differing digits of the first gradients grow to."""
    wanted: list[float] = rounds[0]["trl_default"]["curves"]["loss"]
    everyone: list[list[float]] = [
        result["curves"]["loss"] for results in rounds for result in results.values()
    ]
    return max(abs(a - b) for losses in everyone for a, b in zip(losses, wanted, strict=True))


if __name__ == "__main__":
    sys.exit(main())
