"""Kill a small run at seeded random places, often, and watch its memory, threads and open files.

    .venv/bin/python scripts/soak.py --kills 1000
    .venv/bin/python scripts/soak.py --steps 2000 --kills 20 loss=bco_pair

Every killed run must end as the uninterrupted one: rows, model and optimizer states. Of each rank of the
longest start without a kill the first and the last tenth are compared: memory, threads, open files. The last
line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.invented import write_pairs
from tests.support.killed_runs import KilledRuns
from tests.support.tiny_model import write_model

PAIRS, BATCH = 24, 6
_SAMPLE_SECONDS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
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
        figures = {"kills": options.kills, "steps": options.steps, "equal": True, **watch.growth()}
        print(json.dumps(figures))


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

    # Of a long run each start gets about as far as the number of kills allows.
    reach = 1.0 if options.steps < 100 else min(1.0, 2 / options.kills)
    seconds = 120 + options.steps
    return KilledRuns(folder, overrides, options.processes, options.seed, options.kills, reach, seconds)


@dataclass
class Watch:
    """Samples of the processes of all runs below `folder`, by process."""

    folder: Path
    samples: dict[int, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> None:
        threading.Thread(target=self._look, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def growth(self) -> dict[str, dict[str, float]]:
        """Return the medians of the first and last tenth of the process that ran longest."""
        longest = max(self.samples.values(), key=len, default=[])
        tenth = max(1, len(longest) // 10)
        settled = longest[tenth:]  # the first tenth loads the model
        if len(settled) < 2 * tenth:
            return {}
        names = ("resident_bytes", "threads", "open_files")
        return {
            name: {
                "first": statistics.median(sample[place] for sample in settled[:tenth]),
                "last": statistics.median(sample[place] for sample in settled[-tenth:]),
            }
            for place, name in enumerate(names)
        }

    def _look(self) -> None:
        while not self._end.wait(_SAMPLE_SECONDS):
            for file in self.folder.glob("*/process-*"):
                try:
                    process = int(file.read_text())
                    self.samples[process].append(_held(process))
                except (OSError, ValueError):
                    continue  # it has ended, or has not begun


def _held(process: int) -> tuple[int, int, int]:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line
    )
    files = sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())
    return 1024 * int(status["VmRSS"].split()[0]), int(status["Threads"]), files


if __name__ == "__main__":
    main()
