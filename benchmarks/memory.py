"""What a reference takes by mode: `python -m benchmarks memory --models tiny 40m --processes 1 2`.

One short training run for each mode, without checkpoints, in processes of its own, sharded as in ZeRO-3. Of
the largest rank, in MiB: the reference's weights that are there while the policy trains, the peak while the
reference is made ready (loaded, the store filled, freed), and the peak from then on. On a GPU it is memory
that PyTorch has allocated. Elsewhere weights are counted as tensors, and peaks are of the resident set, with
libraries and with what the allocator keeps; "offload cpu" then moves nothing. Prints a Markdown table; the
last line is JSON.
"""

import argparse
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.assets import ROOT, SHAPES, Setting, overrides, prepare
from benchmarks.child import LAUNCHER, in_fork

LIVE = "reference.mode=live"
COLD, WARM = "cached, the store filled first", "cached, all found in the store"
FOLLOWING = "live, following the policy"
MODES = {
    "none (simpo)": ["loss=simpo", "reference=none"],
    COLD: [],
    WARM: [],
    "live": [LIVE],
    "live, offload cpu": [LIVE, "reference.offload=cpu"],
    "live, offload nvme": [LIVE, "reference.offload=nvme"],
    FOLLOWING: [LIVE, "loss.sync_reference={every: 1, mixup: 0.5}"],
    "live, int8": [LIVE, "reference.quantization=int8"],
    "live, nf4": [LIVE, "reference.quantization=nf4"],
}
_RUN = "--run"

Result = dict[str, int]


def main() -> None:
    if sys.argv[1:2] == [_RUN]:
        _train(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
        return
    arguments = _arguments()
    modes = [mode for mode in arguments.modes if _is_possible(mode)]
    results: dict[str, dict[str, Result]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        for model in arguments.models:
            folder = Path(name) / model
            folder.mkdir()
            setting = _setting(model, arguments)
            in_fork(lambda setting=setting, folder=folder: prepare(setting, folder))  # type: ignore[misc]
            for processes in arguments.processes:
                shutil.rmtree(folder / "store", ignore_errors=True)
                results[f"{model}, {_ranks(processes)}"] = {
                    mode: _measure(mode, folder, processes) for mode in modes
                }
    _print_table(modes, results)
    if skipped := [mode for mode in arguments.modes if mode not in modes]:
        print(f"\nNot possible here: {'; '.join(skipped)}.")
    print(json.dumps(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=["tiny", "40m"])
    parser.add_argument("--processes", type=int, choices=(1, 2), nargs="+", default=[1, 2])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--work", help="where temporary files go")
    parser.add_argument("--smoke", action="store_true", help="the smallest of all, to see that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.models, arguments.processes, arguments.pairs = ["tiny"], [1], 4
        arguments.modes = [COLD, WARM, FOLLOWING]
    return arguments


def _setting(model: str, arguments: argparse.Namespace) -> Setting:
    return Setting(
        model=model,
        data="synthetic",
        pairs=arguments.pairs,
        batch_pairs=max(1, arguments.pairs // 2),
        max_length=1024,
        dtype=arguments.dtype,
        micro_batch_tokens=1024,
        trl_micro_pairs=1,
        shared_prefix=0.5,
        mean_tokens=128,
        length_spread=0.5,
        seed=0,
    )


def _is_possible(mode: str) -> bool:
    if "nvme" in mode:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return bool(AsyncIOBuilder().is_compatible(verbose=False))
    if "int8" in mode or "nf4" in mode:
        return importlib.util.find_spec("bitsandbytes") is not None
    return True


def _ranks(processes: int) -> str:
    return "1 rank" if processes == 1 else f"{processes} ranks"


def _measure(mode: str, folder: Path, processes: int) -> Result:
    """The largest of all ranks."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    extra = [*MODES[mode], *([f"reference.nvme_path={folder}/nvme"] if "nvme" in mode else [])]
    launch = [sys.executable]
    if processes > 1:
        launch = [*LAUNCHER, "--config_file", str(ROOT / "launch" / "accelerate" / "cpu_2.yaml")]
    ended = subprocess.run(
        [*launch, "-m", "benchmarks.memory", _RUN, str(folder), str(folder / "store"), str(out), *extra],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(f"{mode}, {_ranks(processes)}: {ended.returncode}", file=sys.stderr)
    ranks: list[Result] = [json.loads(file.read_text()) for file in out.glob("rank-*.json")]
    if ended.returncode or len(ranks) != processes:
        raise SystemExit(f"{mode} failed:\n{ended.stdout[-4000:]}")
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def _train(folder: Path, store: Path, out: Path, extra: Sequence[str]) -> None:
    """One run in this process; what it took goes to OUT/rank-N.json."""
    from dpo_dist.config.load import load_run_config
    from dpo_dist.config.run_folder import RunFolder
    from dpo_dist.report.console import open_console

    setting = Setting.read(folder)
    config = load_run_config([*overrides(setting, folder, out / "run", store), "parallelism=zero3", *extra])
    measured: Result = {}
    with open_console(RunFolder(out / "run")) as console:
        from dpo_dist.distributed.checkpoint import CheckpointSaver
        from dpo_dist.training import finish as finish_module
        from dpo_dist.training import reference_setup
        from dpo_dist.training import run as run_module

        build = reference_setup.prepare_reference

        def build_and_weigh(*arguments: Any) -> Any:
            before = _weights()
            _restart_peak()
            reference = build(*arguments)
            measured["peak while made ready"] = _peak()
            measured["kept"] = _weights() - before
            _restart_peak()
            return reference

        with (
            patch.object(run_module, "prepare_reference", build_and_weigh),
            patch.object(CheckpointSaver, "save"),
            patch.object(finish_module, "export_model"),
        ):
            run_module.train(config, console)
    measured["peak while training"] = _peak()
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(measured))


def _weights() -> int:
    """Bytes of what PyTorch holds on the GPU; else of numbers in all tensors, shards of ZeRO-3 included."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    tensors += [tensor.ds_tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _restart_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


def _print_table(modes: Sequence[str], results: dict[str, dict[str, Result]]) -> None:
    columns = [f"{world}: kept, ready, training" for world in results]
    print("| mode | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for mode in modes:
        cells = [_cell(of_mode[mode]) for of_mode in results.values()]
        print(f"| {mode} | " + " | ".join(cells) + " |")


def _cell(result: Result) -> str:
    kept = result["kept"] / 2**20
    peaks = (result[f"peak while {phase}"] / 2**20 for phase in ("made ready", "training"))
    return ", ".join([f"{kept:.1f}" if kept < 10 else f"{kept:.0f}", *(f"{peak:.0f}" for peak in peaks)])


if __name__ == "__main__":
    main()
