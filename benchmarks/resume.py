"""Measure a resume in the world that saved the checkpoint, and in others.

A model of random weights with its optimizer states is saved on two processes with ZeRO-3. Each world then
checks the files (`verified`, shared among its processes) and loads its slices (`loaded`), in every round with
files that are not in memory. The bytes are those that the disk gave: of all processes, and of the one with
most, as a share of the checkpoint. Ratios are those to the world that saved it, round by round.
"""

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import Benchmark, Json
from benchmarks.setting import SHAPES, save_random_model
from benchmarks.tables import markdown
from dpo_dist.config.schema import Dtype, ModelConfig, OptimConfig, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.distributed.checkpoint_files import latest_checkpoint, load_checkpoint
from dpo_dist.distributed.join import joined
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine, policy_config
from dpo_dist.model.load import load_packed

_STATES = ("exp_avg", "exp_avg_sq")
_SAVED_BY = "2 zero3"
_OTHERS = ("2 zero2", "2 ddp", "1 ddp", "3 zero3")


@dataclass(frozen=True)
class _World:
    """Processes of one kind of parallelism, and the folder of the model and its checkpoint."""

    size: int
    kind: ParallelismKind
    folder: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> "_World":
        size, kind = name.split()
        return cls(int(size), ParallelismKind(kind), folder)

    def call(self, work: Callable[[World, PolicyEngine, Path], Json]) -> list[Json]:
        """Return the result of `work` in each process, by rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")  # whose parent imports once
        context.set_forkserver_preload([__name__])
        results = context.Queue()
        processes = [
            context.Process(target=self._rank, args=(rank, port, work, results)) for rank in range(self.size)
        ]
        for process in processes:
            process.start()
        found = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
        return [found[rank] for rank in range(self.size)]

    def _rank(self, rank: int, port: int, work: Callable[..., Json], results: Any) -> None:
        place = {"RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.size}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        optim, path = OptimConfig(), self.folder / "model"
        with joined(policy_config(ParallelismConfig(self.kind), optim, Dtype.fp32), 600) as world:
            model = load_packed(path, ModelConfig(str(path), dtype=Dtype.fp32), 1024, world.device)
            result = work(world, PolicyEngine(model, optim, world), self.folder / "checkpoints")
        results.put((rank, result))


def _save(world: World, policy: PolicyEngine, root: Path) -> Json:
    policy._slices().create_states(_STATES, 1)
    saver = CheckpointSaver(root, 1, [policy], world, behind=False)
    saver.save(1, {"step": 1})
    saver.commit()
    saver.close()
    return {}


def _resume(world: World, policy: PolicyEngine, root: Path) -> Json:
    figures: Json = {}
    _forget_files(root, world)
    with _measured("verified", figures, world):
        found = latest_checkpoint(root, world)
    assert found is not None
    _forget_files(root, world)
    with _measured("loaded", figures, world):
        load_checkpoint(found, [policy], world)
    return figures


def _forget_files(root: Path, world: World) -> None:
    """Remove the files below `root` from the page cache."""
    for file in root.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    world.barrier()


@contextmanager
def _measured(name: str, figures: Json, world: World) -> Iterator[None]:
    world.barrier()
    started, before = time.monotonic(), _read_bytes()
    yield
    figures[f"{name} bytes"] = _read_bytes() - before
    world.barrier()
    figures[f"{name} seconds"] = time.monotonic() - started


def _read_bytes() -> int:
    """Return the bytes that this process has made the disk read, also through mapped files."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def run(options: Namespace) -> Json:
    """Measure all worlds."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        (folder / "checkpoints").mkdir()
        save_random_model(SHAPES[options.model], folder / "model", seed=0)
        _World.of(_SAVED_BY, folder).call(_save)
        size = sum(file.stat().st_size for file in folder.glob("checkpoints/*/engine/*"))
        worlds = [_SAVED_BY, *options.worlds]
        rounds = [
            {world: _World.of(world, folder).call(_resume) for world in worlds} for _ in range(options.rounds)
        ]
    figures: Json = {world: _figures(world, rounds, size) for world in worlds}
    print(f"checkpoint of {size / 2**20:.0f} MiB, saved by {_SAVED_BY}\n")
    rows = [[world, *(f"{value:.3g}" for value in of_world.values())] for world, of_world in figures.items()]
    print(markdown([["resumed by", *figures[_SAVED_BY]], *rows]))
    return {"checkpoint_bytes": size, **figures}


def _figures(world: str, rounds: list[dict[str, list[Json]]], size: int) -> dict[str, float]:
    """Return medians over the rounds."""
    found: dict[str, list[float]] = {}
    for of_round in rounds:
        for name in ("verified", "loaded"):
            seconds, same = (of_round[key][0][f"{name} seconds"] for key in (world, _SAVED_BY))
            read = [rank[f"{name} bytes"] / size for rank in of_round[world]]
            values = {"s": seconds, "ratio": seconds / same, "read by all": sum(read), "by one": max(read)}
            for column, value in values.items():
                found.setdefault(f"{name}, {column}", []).append(value)
    return {column: statistics.median(values) for column, values in found.items()}


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--worlds", nargs="+", default=_OTHERS, help="numbers of processes and kinds: '1 ddp'"
    )


BENCHMARK = Benchmark(
    run,
    shared={"model": "40m", "rounds": 3, "threads": 1},
    own=_own_options,
    smoke={"model": "tiny", "rounds": 1, "worlds": ["1 ddp"]},
)
