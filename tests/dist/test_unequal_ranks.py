"""Ranks that were started with different settings, packages or code do not begin to train."""

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import FolderConfig, MetricsConfig, OptimConfig, RunConfig
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.distributed.processes.world import World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.start import environment
from dpo_dist.training.start.environment import check_same_start
from tests.support.ranks import run_ranks

CONFIG = RunConfig(run=FolderConfig(dir="run"))
OWN = "own_code:function"
Prepare = Callable[[World, Path], RunConfig]


def another_rate(world: World, _folder: Path) -> RunConfig:
    return replace(CONFIG, optim=OptimConfig(lr=1e-3 if world.rank else 5e-7))


def another_version(world: World, _folder: Path) -> RunConfig:
    version = importlib.metadata.version
    if world.rank == 2:
        importlib.metadata.version = lambda name: "0.19.7" if name == "deepspeed" else version(name)
    return CONFIG


def another_checkout(world: World, folder: Path) -> RunConfig:
    if world.rank == 1:
        (folder / "checkout").mkdir()
        (folder / "checkout/losses.py").write_text("# an older commit\n")
        environment._PACKAGE_FOLDER = folder / "checkout"
    return CONFIG


def another_source(world: World, folder: Path, config: RunConfig) -> RunConfig:
    node = folder / f"node-{min(world.rank, 1)}"
    node.mkdir(exist_ok=True)
    (node / "own_code.py").write_text(f"def function(): return {min(world.rank, 1)}\n")
    os.chdir(node)
    return config


LOSS = replace(CONFIG, loss=LossConfig(LossKind.custom, function=OWN))
METRICS = replace(CONFIG, metrics=MetricsConfig(OWN))
READER = replace(CONFIG, data=DataConfig(train=[SourceConfig("pairs.jsonl", reader=OWN)]))


def refusal(prepare: Prepare, world: World, folder: Path) -> list[str]:
    world = replace(world, peers=tuple(replace(peer, host=f"node-{peer.rank}") for peer in world.peers))
    config = prepare(world, folder)
    try:
        check_same_start(config, world)
    except ConfigError as error:
        return [str(error.where), str(error.got)]
    return []


def refusals(world: World, folder: Path) -> list[list[str]]:
    version, package = importlib.metadata.version, environment._PACKAGE_FOLDER
    found = []
    for _, prepare, *_ in CASES:
        found.append(refusal(prepare, world, folder))
        importlib.metadata.version, environment._PACKAGE_FOLDER = version, package
    return found


CASES: list[tuple[str, Prepare, str]] = [
    ("", lambda *_: CONFIG, ""),
    (
        "optim.lr",
        another_rate,
        "optim.lr: 5e-07 on rank 0 (node-0); 0.001 on rank 1 (node-1) and 1 other rank",
    ),
    (
        "version of deepspeed",
        another_version,
        " on rank 0 (node-0) and 1 other rank; 0.19.7 on rank 2 (node-2)",
    ),
    ("source of dpo_dist", another_checkout, " on rank 1 (node-1)"),
    (f"source of {OWN}", partial(another_source, config=LOSS), " on rank 1 (node-1) and 1 other rank"),
    (f"source of {OWN}", partial(another_source, config=METRICS), " on rank 1 (node-1) and 1 other rank"),
    (f"source of {OWN}", partial(another_source, config=READER), " on rank 1 (node-1) and 1 other rank"),
]


def test_every_rank_names_what_differs_with_rank_and_host(tmp_path: Path) -> None:
    first, *others = run_ranks(refusals, 3, tmp_path / "ranks")
    assert all(other == first for other in others)
    for (where, _, got), found in zip(CASES, first, strict=True):
        assert (found[0] if found else "") == where
        assert got in (found[1] if found else "")
