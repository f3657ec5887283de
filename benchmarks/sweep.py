"""Measure the cost of a sweep over losses and betas on one base, beside TRL.

Each point of dpo_dist is one command line in a process of its own, as a person runs them; all share one store
and one cache of encoded data. TRL's points share one process, so that its packages are loaded once. Every
point trains the same weights on the same token ids in the same order; the first step of each must agree with
TRL's, else the exit code is 1.

    dpo_dist      reference log-probs are found in the store by content
    trl_default   the reference beside the policy, in every step
    trl_kept      reference log-probs computed before training and kept beside the dataset

`rest` is starting processes, loading, saving, plots and reports. The step-0 check of each run of dpo_dist
scores one pair (`reference.audit_pairs`), because its sample is small beside real data; it is in `rest`.
"""

import json
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

from benchmarks.options import Benchmark, Json
from benchmarks.runs import Result, Run, in_fork, python, start_sweep
from benchmarks.setting import Setting, default_data, overrides, prepare
from benchmarks.tables import markdown

BETAS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
LOSSES = ("sigmoid", "ipo", "hinge")
TRL = ("trl_default", "trl_kept")
COUNTED = ("scored_pairs", "reference_seconds", "training_seconds", "whole_seconds")
TOLERANCE = 1e-4


def run(options: Namespace) -> Json:
    """Measure the sweep of each trainer."""
    mean_tokens = 24 if options.smoke else 150
    setting = Setting.of(options, trl_micro_pairs=options.batch_pairs, mean_tokens=mean_tokens)
    points = tuple((kind, beta) for kind in options.losses for beta in options.betas)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        in_fork(lambda: prepare(setting, folder))
        results = {"dpo_dist": _sweep(setting, folder, points)}
        for variant in TRL:
            results[variant] = start_sweep(Run(str(folder), variant, "", points=points))
    print(f"{len(points)} points: {', '.join(options.losses)} at {len(options.betas)} betas. {setting}\n")
    print(markdown(_table(results)))
    first, largest = _differences(results)
    ours = results["dpo_dist"]
    return {
        "trainers_agree": first <= TOLERANCE,
        "points": len(points),
        "results": {name: {key: round(of[key], 3) for key in COUNTED} for name, of in results.items()},
        "ratios": {name: {key: round(results[name][key] / ours[key], 3) for key in COUNTED} for name in TRL},
        "first_step_difference": first,
        "largest_loss_difference": largest,
    }


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--losses", nargs="+", default=LOSSES, help="kinds that both trainers have")
    parser.add_argument("--betas", nargs="+", type=float, default=BETAS)


def _fault(options: Namespace) -> str:
    return "pairs must be a multiple of batch-pairs" if options.pairs % options.batch_pairs else ""


def _sweep(setting: Setting, folder: Path, points: tuple[tuple[str, float], ...]) -> Result:
    """Run every point by its command line, one after the other."""
    result: Result = {**dict.fromkeys(COUNTED, 0), "losses": []}
    for kind, beta in points:
        run_dir = folder / "run"
        chosen = [f"loss={kind}", f"loss.beta={beta}", "parallelism=ddp", "reference.audit_pairs=1"]
        command = [*overrides(setting, folder, run_dir, folder / "store"), *chosen]
        result["whole_seconds"] += python(["-m", "dpo_dist.train", *command])
        metrics = run_dir / "dpo_metrics"
        summary = json.loads((metrics / "summary.json").read_text())
        rows = json.loads((metrics / "log_history.json").read_text())
        result["scored_pairs"] += summary["reference"]["computed"] / 2
        result["reference_seconds"] += summary["reference"]["seconds"]
        result["training_seconds"] += summary["train_seconds"]
        result["losses"].append([row["loss"] for row in rows])
        shutil.rmtree(run_dir)
    return result


def _table(results: dict[str, Result]) -> list[list[str]]:
    rows = [["", "pairs scored by the reference", "reference, s", "training, s", "rest, s", "in all, s"]]
    for name, of in results.items():
        rest = of["whole_seconds"] - of["reference_seconds"] - of["training_seconds"]
        seconds = (of["reference_seconds"], of["training_seconds"], rest, of["whole_seconds"])
        rows.append([name, f"{of['scored_pairs']:g}", *(f"{value:.1f}" for value in seconds)])
    return rows


def _differences(results: dict[str, Result]) -> tuple[float, float]:
    """Return TRL's distance from our losses, relative to ours above 1: of first steps, and of all."""
    apart = [
        [abs(theirs - ours) / max(1.0, abs(ours)) for theirs, ours in zip(*steps, strict=True)]
        for name in TRL
        for steps in zip(results[name]["losses"], results["dpo_dist"]["losses"], strict=True)
    ]
    return max(point[0] for point in apart), max(max(point) for point in apart)


BENCHMARK = Benchmark(
    run,
    shared={"model": "5m", "data": default_data(), "pairs": 8, "batch_pairs": 4, "max_length": 256},
    own=_own_options,
    smoke={"losses": LOSSES[:1], "betas": BETAS[4:6], "model": "tiny", "data": "synthetic"},
    fault=_fault,
)
