"""Measure the memory of each reference mode.

Starts one short training run for each mode, with ZeRO-3, without checkpoints, in its own processes. Prints
three numbers of MiB, each of the largest rank: the reference's weights while the policy trains; the peak
while the reference is prepared (loaded, the store filled, freed); the peak after it. On a GPU this is memory
that PyTorch has allocated. On a CPU, weights are counted as tensors, peaks are those of the resident set,
which has libraries and memory that the allocator keeps, and "offload cpu" moves nothing.
"""

import importlib.util
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import Benchmark, Json, markdown
from benchmarks.runs import Run, in_fork, start
from benchmarks.setting import SHAPES, Setting, prepare

LIVE = "reference.mode=live"
COLD, WARM = "cached, the store filled first", "cached, all found in the store"
FOLLOWING = "live, following the policy"
MODES = {
    "none (simpo)": ["loss=simpo", "reference=none"],
    COLD: [],
    WARM: [],
    "live": [LIVE],
    "live, offload cpu": [LIVE, "reference.offload=cpu"],
    FOLLOWING: [LIVE, "loss.sync_reference={every: 1, mixup: 0.5}"],
    "live, int8": [LIVE, "reference.quantization=int8"],
    "live, nf4": [LIVE, "reference.quantization=nf4"],
}

Bytes = dict[str, int]


def run(options: Namespace) -> Json:
    """Measure all modes that this machine can run."""
    modes = [mode for mode in options.modes if _is_possible(mode)]
    results: dict[str, dict[str, Bytes]] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        for model in options.models:
            folder = Path(name) / model
            folder.mkdir()
            batch_pairs = max(1, options.pairs // 2)
            setting = Setting.from_options(
                options,
                model=model,
                batch_pairs=batch_pairs,
                micro_batch_tokens=1024,
                shared_prefix=0.5,
                mean_tokens=128,
                length_spread=0.5,
            )
            in_fork(lambda setting=setting, folder=folder: prepare(setting, folder))  # type: ignore[misc]
            for processes in options.processes:
                shutil.rmtree(folder / "store", ignore_errors=True)
                world = f"{model}, {processes} rank{'s' * (processes > 1)}"
                results[world] = {mode: _measure(mode, folder, processes) for mode in modes}
    print(markdown(_table(modes, results)))
    if skipped := [mode for mode in options.modes if mode not in modes]:
        print(f"\nNot possible on this machine: {'; '.join(skipped)}.")
    return results


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=["tiny", "40m"])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))


def _is_possible(mode: str) -> bool:
    if "int8" in mode or "nf4" in mode:
        return importlib.util.find_spec("bitsandbytes") is not None
    return True


def _measure(mode: str, folder: Path, processes: int) -> Bytes:
    print(f"{mode}, {processes} processes", file=sys.stderr)
    chosen = ("parallelism=zero3", *MODES[mode])
    job = Run(str(folder), "dpo_dist", str(folder / "store"), chosen, saves=False, weighs_reference=True)
    memory: Bytes = start(job, processes, threads=processes)["memory"]
    return memory


def _table(modes: Sequence[str], results: dict[str, dict[str, Bytes]]) -> list[list[str]]:
    head = ["mode", *(f"{world}: kept, ready, training" for world in results)]
    return [head, *([mode, *(_cell(figures[mode]) for figures in results.values())] for mode in modes)]


def _cell(memory: Bytes) -> str:
    kept = memory["kept"] / 2**20
    peaks = (memory[f"peak while {phase}"] / 2**20 for phase in ("made ready", "training"))
    return ", ".join([f"{kept:.1f}" if kept < 10 else f"{kept:.0f}", *(f"{peak:.0f}" for peak in peaks)])


BENCHMARK = Benchmark(
    run,
    shared={"pairs": 16, "dtype": "fp32", "processes": [1, 2]},
    own=_own_options,
    smoke={"models": ["tiny"], "processes": [1], "pairs": 4, "modes": [COLD, WARM, FOLLOWING]},
)
