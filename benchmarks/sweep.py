"""What a sweep over losses and betas on one base costs, beside TRL's: `python -m benchmarks sweep`.

Each of our points is one command line in a process of its own, as a person runs them, all with one store and
one cache of encoded data. TRL's points share one process, so that its packages are loaded once. Every point
trains the same weights on the same token ids in the same order; the first step of each must agree with TRL's.

    dpo_dist      the reference's values are looked up by content
    trl_default   the reference beside the policy, in every step
    trl_kept      values computed before training and kept beside the data set (`benchmarks/sweep_trl.py`)

Prints a Markdown table and, as the last line, JSON: TRL's pairs and seconds over ours, and how far the losses
lie apart. `rest` is starting processes, loading, saving, plots and reports. The step-0 check, in which each
of our runs scores a sample again, is set to one pair (`reference.audit_pairs`), as the sample is small beside
real data; it is in `rest`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.assets import REAL_DATA, ROOT, SHAPES, Setting, overrides, prepare, shared_data
from benchmarks.child import in_fork
from benchmarks.sweep_trl import SWEEP

Point = tuple[str, float]

BETAS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
LOSSES = ("sigmoid", "ipo", "hinge")
TRL = ("trl_default", "trl_kept")
COUNTED = ("scored_pairs", "reference_seconds", "training_seconds", "whole_seconds")
TOLERANCE = 1e-4


def main() -> int:
    arguments = _arguments()
    has_data = (shared_data() / REAL_DATA["hh"]).is_file()
    setting = Setting(
        model=arguments.model,
        data="hh" if has_data and not arguments.smoke else "synthetic",
        pairs=arguments.pairs,
        batch_pairs=arguments.batch_pairs,
        max_length=arguments.max_length,
        dtype="fp32",
        micro_batch_tokens=4096,
        trl_micro_pairs=arguments.batch_pairs,
        shared_prefix=0.7,
        mean_tokens=24 if arguments.smoke else 150,
        length_spread=0.7,
        seed=0,
    )
    points = [(kind, beta) for kind in arguments.losses for beta in arguments.betas]
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        in_fork(lambda: prepare(setting, folder))
        (folder / SWEEP).write_text(json.dumps(points))
        results = {"dpo_dist": _sweep(setting, folder, points)}
        for variant in TRL:
            results[variant] = _trl_sweep(folder, variant)
    print(f"{len(points)} points: {', '.join(arguments.losses)} at {len(arguments.betas)} betas. {setting}\n")
    _print_table(results)
    differences = _differences(results)
    ratios = {
        name: {key: _ratio(results[name][key], results["dpo_dist"][key]) for key in COUNTED} for name in TRL
    }
    print(json.dumps({"points": len(points), "results": _numbers(results), "ratios": ratios, **differences}))
    return 0 if differences["first_step_difference"] <= TOLERANCE else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", nargs="+", default=LOSSES, help="kinds that both trainers have")
    parser.add_argument("--betas", nargs="+", type=float, default=BETAS)
    parser.add_argument("--model", choices=SHAPES, default="5m")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--batch-pairs", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--work", type=Path, help="where temporary files go")
    parser.add_argument("--smoke", action="store_true", help="two betas of one loss on a tiny model")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(losses=LOSSES[:1], betas=BETAS[4:6], model="tiny")
    if arguments.pairs % arguments.batch_pairs:
        parser.error("pairs must be a multiple of batch-pairs")
    return arguments


def _sweep(setting: Setting, folder: Path, points: list[Point]) -> dict[str, Any]:
    """Every point by our command line, one after the other."""
    told: dict[str, Any] = {**dict.fromkeys(COUNTED, 0), "losses": []}
    for kind, beta in points:
        run_dir = folder / "run"
        chosen = [f"loss={kind}", f"loss.beta={beta}", "parallelism=ddp", "reference.audit_pairs=1"]
        command = [*overrides(setting, folder, run_dir, folder / "store"), *chosen]
        told["whole_seconds"] += _timed([sys.executable, "-m", "dpo_dist.train", *command])
        metrics = run_dir / "dpo_metrics"
        summary = json.loads((metrics / "summary.json").read_text())
        told["scored_pairs"] += summary["reference"]["computed"] / 2
        told["reference_seconds"] += summary["reference"]["seconds"]
        told["training_seconds"] += summary["train_seconds"]
        told["losses"].append([row["loss"] for row in json.loads((metrics / "log_history.json").read_text())])
        shutil.rmtree(run_dir)
    return told


def _trl_sweep(folder: Path, variant: str) -> dict[str, Any]:
    out = folder / f"{variant}.json"
    seconds = _timed([sys.executable, "-m", "benchmarks.sweep_trl", str(folder), variant, str(out)])
    return {**json.loads(out.read_text()), "whole_seconds": seconds}


def _timed(command: list[str]) -> float:
    """Seconds from the start of a process to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    started = time.monotonic()
    ended = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{ended.stdout[-4000:]}")
    return time.monotonic() - started


def _print_table(results: dict[str, dict[str, Any]]) -> None:
    print("| | pairs scored by the reference | reference, s | training, s | rest, s | in all, s |")
    print("|---|---|---|---|---|---|")
    for name, told in results.items():
        rest = told["whole_seconds"] - told["reference_seconds"] - told["training_seconds"]
        seconds = (told["reference_seconds"], told["training_seconds"], rest, told["whole_seconds"])
        print(f"| {name} | {told['scored_pairs']:g} | {' | '.join(f'{value:.1f}' for value in seconds)} |")


def _numbers(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {name: {key: round(told[key], 3) for key in COUNTED} for name, told in results.items()}


def _ratio(theirs: float, ours: float) -> float:
    return round(theirs / ours, 3)


def _differences(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far TRL's losses lie from ours, relative to ours above 1: of first steps, and of all."""
    apart = [
        [abs(theirs - ours) / max(1.0, abs(ours)) for theirs, ours in zip(*steps, strict=True)]
        for name in TRL
        for steps in zip(results[name]["losses"], results["dpo_dist"]["losses"], strict=True)
    ]
    return {
        "first_step_difference": max(point[0] for point in apart),
        "largest_loss_difference": max(max(point) for point in apart),
    }


if __name__ == "__main__":
    sys.exit(main())
