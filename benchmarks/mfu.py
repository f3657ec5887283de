"""How much of a device training uses: `python -m benchmarks mfu --model 7b --layers 20`.

Random weights of real shapes on real lengths, cached reference, the whole program but for checkpoints and
the exported model. A variant is options joined by `+`; each runs in a process of its own. mfu counts unique
tokens and nothing that is computed twice, against products of large matrices in the same process. The first
steps, in which kernels are chosen and compiled, are left out of the medians. The last line is JSON.

Weights, gradients, master weights and Adam's states take about 20 bytes a parameter: the 7B shape with all of
its 28 layers does not fit on one GPU of 140 GB. Take fewer layers, which are alike, or --offload-optimizer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.assets import REAL_DATA, ROOT, SHAPES, Setting, overrides, prepare, shared_data

OPTIONS = {
    "plain": [],
    "sdpa": ["model.attention=sdpa"],
    "varlen": ["model.attention=varlen"],
    "flash": ["model.attention=flash_attention_2"],
    "full": ["model.gradient_checkpointing=full"],
    "every2": ["model.gradient_checkpointing=2"],
    "every4": ["model.gradient_checkpointing=4"],
    "liger": ["model.liger=true"],
    "compile": ["model.compile=true"],
}
_RUN, _PREPARE = "--run", "--prepare"

Result = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == [_RUN]:
        _train(sys.argv[2:])
        return
    if sys.argv[1:2] == [_PREPARE]:
        prepare(Setting(**json.loads(sys.argv[3])), Path(sys.argv[2]))
        return
    arguments = _arguments()
    setting = _setting(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        failure = _child(["-m", "benchmarks.mfu", _PREPARE, str(folder), json.dumps(vars(setting))])
        if failure:
            raise SystemExit(f"the benchmark's model and pairs could not be made:\n{failure}")
        results = {variant: _measure(variant, setting, folder, arguments) for variant in arguments.variants}
        if arguments.trl:
            trls = ("trl_default", f"trl_best_{arguments.trl_best_micro_pairs}")
            results |= {variant: _measure_trl(variant, setting, folder) for variant in trls}
    layers = setting.layers or SHAPES[setting.model].layers
    print(f"{setting.model} with {layers} of {SHAPES[setting.model].layers} layers, {setting}")
    _print_table(results)
    print(json.dumps({"setting": vars(setting), "layers": layers, "variants": results}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_data = (shared_data() / REAL_DATA["hh"]).is_file()
    parser.add_argument("--model", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, all else equal")
    parser.add_argument(
        "--data", choices=(*REAL_DATA, "synthetic"), default="hh" if has_data else "synthetic"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="of the steps, not measured")
    parser.add_argument("--batch-pairs", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--variants", nargs="+", default=["plain", "liger", "compile", "full", "sdpa"])
    parser.add_argument("--offload-optimizer", action="store_true", help="to host memory, by zero2")
    parser.add_argument("--trl", action="store_true", help="TRL beside, on the same pairs")
    parser.add_argument("--trl-micro-pairs", type=int, default=8)
    parser.add_argument("--trl-best-micro-pairs", type=int, default=8)
    parser.add_argument("--work", type=Path, help="where temporary files go: the model, twice in memory")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(
            model="tiny", data="synthetic", steps=3, warm_up=1, batch_pairs=4, dtype="fp32", max_length=256
        )
        vars(arguments).update(
            variants=["plain", "full", "every2"], trl_micro_pairs=2, trl_best_micro_pairs=2
        )
    unknown = {option for variant in arguments.variants for option in variant.split("+")} - OPTIONS.keys()
    if unknown:
        parser.error(f"unknown options {sorted(unknown)}; there are {', '.join(OPTIONS)}")
    if arguments.warm_up >= arguments.steps:
        parser.error("no step is left to measure")
    return arguments


def _setting(arguments: argparse.Namespace) -> Setting:
    return Setting(
        model=arguments.model,
        data=arguments.data,
        pairs=arguments.steps * arguments.batch_pairs,
        batch_pairs=arguments.batch_pairs,
        max_length=arguments.max_length,
        dtype=arguments.dtype,
        micro_batch_tokens=arguments.micro_batch_tokens,
        trl_micro_pairs=arguments.trl_micro_pairs,
        shared_prefix=0.7,
        mean_tokens=24 if arguments.smoke else 400,
        length_spread=0.7,
        seed=0,
        layers=arguments.layers,
    )


def _measure(variant: str, setting: Setting, folder: Path, arguments: argparse.Namespace) -> Result:
    """Medians over the measured steps; `failed` says why there are none, as memory that ran out does."""
    run_dir = folder / "runs" / variant
    kind = ["zero2", "cpu"] if arguments.offload_optimizer else ["ddp", "none"]
    options = [override for option in variant.split("+") for override in OPTIONS[option]]
    command = [
        *overrides(setting, folder, run_dir, folder / "store"),
        f"parallelism.kind={kind[0]}",
        f"parallelism.offload_optimizer={kind[1]}",
        "optim.lr=1e-6",
        *options,
    ]
    failure = _child(["-m", "benchmarks.mfu", _RUN, str(run_dir), *command])
    if failure:
        return {"failed": failure}
    metrics = run_dir / "dpo_metrics"
    rows = json.loads((metrics / "log_history.json").read_text())[arguments.warm_up :]
    summary = json.loads((metrics / "summary.json").read_text())
    names = ("mfu", "tokens_per_second", "pairs_per_second", "step_seconds")
    return {
        **{name: statistics.median(row[name] for row in rows) for name in names},
        "peak_bytes": summary["peak_memory_bytes"],
        "reference_seconds": summary["reference"]["seconds"],
        "loss": [row["loss"] for row in rows],
    }


def _measure_trl(variant: str, setting: Setting, folder: Path) -> Result:
    out = folder / variant
    failure = _child(["-m", "benchmarks.variant", str(folder), variant, str(folder / "store"), str(out)])
    if failure:
        return {"failed": failure}
    measured = json.loads((out / "rank-0.json").read_text())
    return {
        "pairs_per_second": setting.pairs / measured["training"]["seconds"],
        "peak_bytes": measured["peak_bytes"],
        "reference_seconds": measured["reference"]["seconds"],
    }


def _child(arguments: list[str]) -> str:
    """Run python with these; the end of what it said if it failed."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ended.stdout[-2000:] if ended.returncode else ""


def _train(arguments: list[str]) -> None:
    """The whole program, less what would write 12 bytes a parameter to disk."""
    from dpo_dist.config.load import load_run_config
    from dpo_dist.config.run_folder import RunFolder
    from dpo_dist.report.console import open_console

    run_dir, *command = arguments
    with open_console(RunFolder(Path(run_dir))) as console:
        from dpo_dist.distributed.checkpoint import CheckpointSaver
        from dpo_dist.training import finish as finish_module
        from dpo_dist.training import run as run_module

        with patch.object(CheckpointSaver, "save"), patch.object(finish_module, "export_model"):
            run_module.train(load_run_config(command), console)


def _print_table(results: dict[str, Result]) -> None:
    print(f"{'':20} {'mfu':>6} {'tokens/s':>9} {'pairs/s':>8} {'s/step':>7} {'peak GiB':>8} {'reference':>9}")
    for variant, result in results.items():
        if "failed" in result:
            print(f"{variant:20} failed: {result['failed'].strip().splitlines()[-1][:80]}")
            continue
        share, tokens, seconds = (
            result.get(name, float("nan")) for name in ("mfu", "tokens_per_second", "step_seconds")
        )
        print(
            f"{variant:20} {share:6.1%} {tokens:9.0f} {result['pairs_per_second']:8.2f} {seconds:7.2f} "
            f"{result['peak_bytes'] / 2**30:8.2f} {result['reference_seconds']:8.1f}s"
        )


if __name__ == "__main__":
    main()
