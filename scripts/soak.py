"""Kill a small run at seeded random places, often, and watch its memory, threads and open files.

    .venv/bin/python scripts/soak.py --kills 1000
    .venv/bin/python scripts/soak.py --steps 2000 --kills 20 loss=bco_pair
    .venv/bin/python scripts/soak.py --first-steps 4
    .venv/bin/python scripts/soak.py --precompute

Every killed run must end as the uninterrupted one: rows, model and optimizer states. Of each rank's longest
start the first and the last tenth of training are compared: memory, threads and open files of the process and
its children, and their number. The exit code is 1 if one of them grows. The last line is JSON; `flat` is null
if no start was long enough.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.invented import write_pairs
from tests.support.killed_runs import KilledRuns
from tests.support.launch import run_verb
from tests.support.tiny_model import write_model

PAIRS, BATCH = 24, 6
_SAMPLE_SECONDS = 0.5
_LEAST_SAMPLES = 60
_MEASURES = ("resident_bytes", "threads", "open_files", "processes")
# The allocator's memory rises and falls by less; a leak of 10 kB a step in 2,000 steps by more.
_MEMORY_GROWTH = 1.03


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--first-steps", type=int, help="complete a run of so many, then lengthen and kill it"
    )
    parser.add_argument("--precompute", action="store_true", help="fill the store of each run first")
    parser.add_argument("overrides", nargs="*", help="of the run: model.dtype=bf16 parallelism.kind=ddp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = _runs(Path(temporary), options)
        started = time.monotonic()
        watch = Watch(Path(temporary))
        with watch:
            runs.check(
                done=lambda kills: print(f"{kills} kills, {time.monotonic() - started:.0f} s", flush=True)
            )
    growth = watch.growth()
    figures = {"kills": options.kills, "steps": options.steps, "equal": True}
    print(json.dumps({**figures, "flat": is_flat(growth), "ranks": growth}))
    return 1 if is_flat(growth) is False else 0


def _runs(folder: Path, options: argparse.Namespace) -> KilledRuns:
    write_model(folder / "model")
    write_pairs(folder / "train.jsonl", PAIRS, seed=1)

    def overrides(run: Path) -> list[str]:
        return [
            f"model.path={folder}/model",
            "model.dtype=fp32",
            f"data.train=[{folder}/train.jsonl]",
            f"data.cache={run}/encoded",
            f"reference.store={run}/store",
            f"run.dir={run}/run",
            f"trainer.global_batch_pairs={BATCH}",
            f"trainer.epochs={-(-options.steps * BATCH // PAIRS)}",
            f"trainer.max_steps={options.steps}",
            f"trainer.save_every={max(1, options.steps // 200)}",
            "trainer.log_every=1",
            "optim.lr=1e-4",
            "tracking.wandb=off",
            *options.overrides,
        ]

    def before(run: Path) -> None:
        if options.precompute:
            demand("precompute", overrides(run))
        if options.first_steps:
            demand("train", [*overrides(run), f"trainer.max_steps={options.first_steps}"])

    def demand(verb: str, command: list[str]) -> None:
        ended = run_verb(verb, command, processes=options.processes)
        assert ended.code == 0, ended.output

    # Of a long run each start gets about as far as the number of kills allows.
    reach = 1.0 if options.steps < 100 else min(1.0, 2 / options.kills)
    seconds = 120 + options.steps
    seed, kills = options.seed, options.kills
    return KilledRuns(folder, overrides, options.processes, seed, kills, reach, seconds, before)


Growth = dict[str, dict[str, float]]


@dataclass
class Watch:
    """Samples of every rank of all runs below `folder`, by rank and process, while it trains."""

    folder: Path
    samples: dict[tuple[str, int], list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> None:
        threading.Thread(target=self._look, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def growth(self) -> dict[str, Growth]:
        """Return the medians of the first and the last tenth of each rank's longest start, by rank."""
        longest: dict[str, list[tuple[int, ...]]] = {}
        for (rank, _), samples in self.samples.items():
            longest[rank] = max(longest.get(rank, []), samples, key=len)
        return {rank: _growth(samples) for rank, samples in longest.items() if len(samples) >= _LEAST_SAMPLES}

    def _look(self) -> None:
        while not self._end.wait(_SAMPLE_SECONDS):
            for file in self.folder.glob("*/process-*"):
                run = file.parent / "run"
                is_training = any(run.glob("checkpoints/step-??????")) and not (run / "model").exists()
                with contextlib.suppress(OSError, ValueError, psutil.Error):  # it has ended, or not begun
                    process = psutil.Process(int(file.read_text()))
                    if is_training and process.status() != psutil.STATUS_ZOMBIE:
                        self.samples[file.name, process.pid].append(_held(process))


def _held(process: psutil.Process) -> tuple[int, ...]:
    """Return the `_MEASURES` of a process and its children."""
    family = [process, *process.children(recursive=True)]
    held = [(one.memory_info().rss, one.num_threads(), one.num_fds(), 1) for one in family]
    return tuple(map(sum, zip(*held, strict=True)))


def _growth(samples: list[tuple[int, ...]]) -> Growth:
    tenth = len(samples) // 10
    settled = samples[tenth:]  # of a resumed start the first tenth loads the model
    return {
        name: {
            "first": statistics.median(sample[place] for sample in settled[:tenth]),
            "last": statistics.median(sample[place] for sample in settled[-tenth:]),
        }
        for place, name in enumerate(_MEASURES)
    }


def is_flat(growth: dict[str, Growth]) -> bool | None:
    """Return whether no rank's measures have grown; None without measures."""
    if not growth:
        return None
    return all(
        of["last"] <= of["first"] * (_MEMORY_GROWTH if name == "resident_bytes" else 1)
        for rank in growth.values()
        for name, of in rank.items()
    )


if __name__ == "__main__":
    sys.exit(main())
