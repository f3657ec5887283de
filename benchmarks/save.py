"""Measure the delay of training by a checkpoint, written at once and behind the steps, in turn.

One process has weights and two optimizer states of the given sizes, and makes steps of matrix products that
change them. Each round saves once at once and once behind, and then makes steps until the checkpoint is
committed. "held" is the time from the end of a step to the start of the next one; "slower" is the time that
all steps until the commit, and the commit, take longer than as many steps without a save.
"""

import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.options import Benchmark, Json
from benchmarks.tables import markdown
from dpo_dist.config.schema import Dtype, OptimConfig, ParallelismConfig
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.distributed.join import joined
from dpo_dist.distributed.slices import WEIGHT, ModelSlices, Slice
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import policy_config

_PARTS = (WEIGHT, "exp_avg", "exp_avg_sq")
_WIDTH = 1024


@dataclass(frozen=True)
class Training:
    """Weights with optimizer states, and steps that change them."""

    parts: dict[str, Tensor]
    products: int

    def shards(self) -> ModelSlices:
        """Return them as one slice."""
        elements = self.parts[WEIGHT].numel()
        return ModelSlices("engine", [Slice("weight", (elements,), 0, self.parts)], states=2)

    def load_shards(self, folder: Path) -> None:
        """Nothing is loaded here."""

    def step(self) -> float:
        """Make a step and return its seconds."""
        started = time.monotonic()
        square = torch.ones(_WIDTH, _WIDTH)
        for _ in range(self.products):
            square = square @ square / _WIDTH
        for tensor in self.parts.values():
            tensor.add_(square[0, 0])
        return time.monotonic() - started


def run(options: Namespace) -> Json:
    """Measure all sizes."""
    torch.set_num_threads(options.threads)
    figures: Json = {}
    config = policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32)
    with joined(config, 600) as world:
        for mebibytes in options.mebibytes:
            elements = mebibytes * 2**20 // 4 // len(_PARTS)
            training = Training({part: torch.rand(elements) for part in _PARTS}, options.products)
            figures[f"{mebibytes} MiB"] = _measure(training, options, world)
    rows = [[size, *(f"{value:.3g}" for value in of_size.values())] for size, of_size in figures.items()]
    print(markdown([["checkpoint", *next(iter(figures.values()))], *rows]))
    return figures


def _measure(training: Training, options: Namespace, world: World) -> dict[str, float]:
    """Return medians over the rounds; ratios are those of behind to at once, round by round."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        savers = {
            way: CheckpointSaver(Path(name) / way, 1, [training], world, behind=way == "behind")
            for way in ("at once", "behind")
        }
        for number in range(options.rounds + 1):
            plain = statistics.median(training.step() for _ in range(5))
            of_round = {way: _save(training, saver, number, plain) for way, saver in savers.items()}
            if number == 0:  # memory of the copies is allocated
                continue
            for index, measure in enumerate(("held", "slower")):
                at_once, behind = (of_round[way][index] for way in savers)
                found.setdefault(f"{measure} at once, s", []).append(at_once)
                found.setdefault(f"{measure} behind, s", []).append(behind)
                found.setdefault(f"{measure} ratio", []).append(behind / at_once)
        for saver in savers.values():
            saver.close()
    return {column: statistics.median(values) for column, values in found.items()}


def _save(training: Training, saver: CheckpointSaver, number: int, plain: float) -> tuple[float, float]:
    """Save once; return the seconds before the next step, and those lost until the commit."""
    started = time.monotonic()
    saver.save(number, {"step": number})
    held, steps = time.monotonic() - started, 0
    while not saver.is_written:
        training.step()
        steps += 1
    saver.commit()
    return held, time.monotonic() - started - steps * plain


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[512, 2048], help="sizes of a checkpoint")
    parser.add_argument("--products", type=int, default=20, help="matrix products of a step")


BENCHMARK = Benchmark(
    run,
    shared={"rounds": 5, "threads": 1},
    own=_own_options,
    smoke={"mebibytes": [8], "rounds": 1, "products": 1},
)
