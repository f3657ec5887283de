"""Measure steps with W&B tracking while its server does not work, beside steps without tracking.

    .venv/bin/python scripts/dead_network.py [--blocks 10] [--steps 20]

Blocks of steps with and without tracking alternate; a step is a matrix product and a metrics row, each
block ends with a histogram and a table of samples. The last line of each fault is JSON.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig, TrackingConfig, WandbMode
from dpo_dist.insight.metrics.names import Histogram
from dpo_dist.insight.metrics.trackers import Trackers, open_trackers
from tests.support.wandb_server import Fault, WandbServer

MATRIX, METRICS = 600, 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=10, help="of each kind, before and after the fault")
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--faults", nargs="+", default=[*Fault, "never up"], metavar="FAULT")
    options = parser.parse_args()
    for fault in options.faults:
        # A process each: wandb's service and environment are those of a process.
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(fault, options.blocks, options.steps)
        )
        process.start()
        process.join()


def measure(fault: str, blocks: int, steps: int) -> None:
    with WandbServer() as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            WANDB_BASE_URL=server.url,
            WANDB_API_KEY="0123456789" * 4,
            WANDB_CONFIG_DIR=folder,
            NETRC=f"{folder}/netrc",
        )
        if fault == "never up":
            server.fail(Fault.silent)
        run = RunFolder(Path(folder) / "run")
        run.path.mkdir()
        began = time.perf_counter()
        trackers = open_trackers(
            RunConfig(tracking=TrackingConfig(wandb=WandbMode.online)),
            run,
            lambda: None,
            rows=[],
            environment={},
            say=lambda text: print(text, flush=True),
        )
        figures: dict[str, Any] = {"fault": fault, "start_seconds": round(time.perf_counter() - began, 2)}
        worker = Worker(run, trackers, steps)
        figures["ratio_before"] = worker.ratio(blocks)
        if fault != "never up":
            server.fail(Fault(fault))
        figures["ratio"] = worker.ratio(blocks)
        figures["longest_log_ms"] = round(1000 * worker.longest, 2)
        began = time.perf_counter()
        trackers.finish("completed", {"steps": worker.step})
        figures["end_seconds"] = round(time.perf_counter() - began, 1)
        figures["threads_left"] = threading.active_count()
        print(json.dumps(figures), flush=True)
    os._exit(0)


class Worker:
    """Trains a matrix product."""

    def __init__(self, run: RunFolder, trackers: Trackers, steps: int):
        self.run, self.trackers, self.steps = run, trackers, steps
        self.matrix = np.random.default_rng(0).normal(size=(MATRIX, MATRIX))
        self.step, self.longest = 0, 0.0

    def ratio(self, blocks: int) -> float:
        """Return the median time of a block with tracking, divided by that of the block before it."""
        ratios = []
        for _ in range(blocks):
            without, tracked = self._block(lambda: None), self._block(self._log)
            ratios.append(tracked / without)
            self._evaluate()
        return round(statistics.median(ratios), 3)

    def _block(self, log: Callable[[], None]) -> float:
        began = time.perf_counter()
        for _ in range(self.steps):
            self.matrix @ self.matrix
            log()
        return time.perf_counter() - began

    def _log(self) -> None:
        self.step += 1
        row = {"step": float(self.step), **{f"metric-{number}": 0.5 for number in range(METRICS)}}
        self._timed(row, None)

    def _evaluate(self) -> None:
        names = ("prompt", "source", "chosen", "policy", "reference", "policy_tokens", "policy_finished")
        path = self.run.samples_file(self.step)
        path.parent.mkdir(exist_ok=True)
        path.write_text(8 * (json.dumps({"step": self.step, **dict.fromkeys(names, "text")}) + "\n"))
        margins = Histogram.of(self.matrix[0].astype(np.float32))
        self._timed({"step": self.step, "eval_loss": 0.5, "eval_samples/length": 3.0}, margins)

    def _timed(self, row: dict[str, float], margins: Histogram | None) -> None:
        began = time.perf_counter()
        self.trackers.log(row, margins)
        self.longest = max(self.longest, time.perf_counter() - began)


if __name__ == "__main__":
    main()
