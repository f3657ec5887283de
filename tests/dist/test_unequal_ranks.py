"""Ranks that were started with different settings, packages or code do not begin to train."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
from peft.tuners import lora

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import FolderConfig, MetricsConfig, OptimConfig, RunConfig
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.distributed.processes.world import World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.user_code import find_function, user_function
from dpo_dist.training.start import environment
from dpo_dist.training.start.environment import check_same_start
from tests.support.ranks import run_ranks

CONFIG = RunConfig(run=FolderConfig(dir="run"))
OWN = "own_code:function"
INNER = "own.inner.losses:function"
Prepare = Callable[[World, Path], RunConfig]


def another_rate(world: World, _folder: Path) -> RunConfig:
    return replace(CONFIG, optim=OptimConfig(lr=1e-3 if world.rank else 5e-7))


def another_version(world: World, _folder: Path) -> RunConfig:
    """Of a checkout on PYTHONPATH: the metadata are those of the installed package."""
    if world.rank == 2:
        deepspeed.__version__ = "0.19.7"
    return CONFIG


def another_file(world: World, folder: Path) -> RunConfig:
    """Of a library: it was edited on one node."""
    file = folder / f"model-{world.rank}.py"
    file.write_text(f"scaling = {world.rank == 2}\n")
    lora.model.__file__ = str(file)
    return CONFIG


def another_checkout(world: World, folder: Path) -> RunConfig:
    if world.rank == 1:
        (folder / "checkout").mkdir()
        (folder / "checkout/losses.py").write_text("# an older commit\n")
        environment._PACKAGE_FOLDER = folder / "checkout"
    return CONFIG


def another_source(world: World, folder: Path, name: str, config: RunConfig) -> RunConfig:
    """Of one file of the user's, which the function's module or the function itself imports."""
    node = folder / f"node-{world.rank}"
    package = node / "own/inner"
    package.mkdir(parents=True, exist_ok=True)
    files = ("own_code.py", "helper.py", "own/__init__.py", "own/common.py", "own/inner/losses.py")
    for file in (*files, "own/inner/later.py"):
        (node / file).write_text("def function(): return 0\n")
    # Of each case another text, so that the module is executed again.
    (node / "own_code.py").write_text(f"import helper  # {name}\n\ndef function(): return 0\n")
    (package / "losses.py").write_text(
        f"from .. import common  # {name}\ndef function(): from . import later\n"
    )
    with (node / name).open("a") as opened:
        opened.write(f"# {min(world.rank, 1)}\n")
    os.chdir(node)
    for module in [module for module in sys.modules if module.split(".")[0] in ("own", "own_code", "helper")]:
        del sys.modules[module]
    sys.path[:] = [str(node), *(entry for entry in sys.path if "node-" not in entry)]
    importlib.invalidate_caches()
    find_function.cache_clear()
    if name.endswith("later.py"):
        user_function(INNER, "loss.function")()
    return config


LOSS = replace(CONFIG, loss=LossConfig(LossKind.custom, function=OWN))
METRICS = replace(CONFIG, metrics=MetricsConfig(OWN))
OF_PACKAGE = replace(CONFIG, loss=LossConfig(LossKind.custom, function=INNER))
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
    kept: list[tuple[Any, str]] = [
        (deepspeed, "__version__"),
        (environment, "_PACKAGE_FOLDER"),
        (lora.model, "__file__"),
    ]
    values = [getattr(*each) for each in kept]
    found = []
    for _, prepare, *_ in CASES:
        found.append(refusal(prepare, world, folder))
        for (owner, name), value in zip(kept, values, strict=True):
            setattr(owner, name, value)
    return found


def of_user(name: str, config: RunConfig) -> Prepare:
    return partial(another_source, name=name, config=config)


AFTER_FIRST = " on rank 1 (node-1) and 1 other rank"
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
    ("source of peft.tuners.lora.model", another_file, " on rank 2 (node-2)"),
    (f"source of {OWN}, source of own_code", of_user("own_code.py", LOSS), AFTER_FIRST),
    ("source of helper", of_user("helper.py", LOSS), AFTER_FIRST),
    ("source of helper", of_user("helper.py", METRICS), AFTER_FIRST),
    ("source of helper", of_user("helper.py", READER), AFTER_FIRST),
    ("source of own", of_user("own/__init__.py", OF_PACKAGE), AFTER_FIRST),
    ("source of own.common", of_user("own/common.py", OF_PACKAGE), AFTER_FIRST),
    ("source of own.inner.later", of_user("own/inner/later.py", OF_PACKAGE), AFTER_FIRST),
    ("", of_user("own/common.py", LOSS), ""),  # nothing imports it
]


def test_every_rank_names_what_differs_with_rank_and_host(tmp_path: Path) -> None:
    first, *others = run_ranks(refusals, 3, tmp_path / "ranks")
    assert all(other == first for other in others)
    for (where, _, got), found in zip(CASES, first, strict=True):
        assert (found[0] if found else "") == where
        assert got in (found[1] if found else "")
