"""Only digested files score: weights replaced while a run starts, and nodes with different files."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.distributed.world import Peer, World
from dpo_dist.foundation.process import StopRequest
from dpo_dist.insight.console import Console
from dpo_dist.reference import engine
from dpo_dist.reference.digest import digest_on_every_node
from dpo_dist.training import reference
from dpo_dist.training import run as run_module
from dpo_dist.training.inputs import load_inputs
from dpo_dist.training.start import Run
from tests.support.invented import write_pairs
from tests.support.ranks import run_ranks, start_ranks
from tests.support.tiny_model import write_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / name, seed=seed) for seed, name in enumerate(("model", "other"))]


@pytest.fixture
def overrides(models: list[Path], tmp_path: Path) -> list[str]:
    return [
        f"model.path={models[0]}",
        "model.dtype=fp32",
        f"data.train=[{write_pairs(tmp_path / 'pairs.jsonl', 4)}]",
        f"data.cache={tmp_path / 'encoded'}",
        f"reference.store={tmp_path / 'store'}",
        f"run.dir={tmp_path / 'run'}",
        "trainer.global_batch_pairs=4",
        "tracking.wandb=off",
    ]


def while_exchanged(load: Callable[..., Any], folder: Path, other: Path) -> Callable[..., Any]:
    """Return `load`, which finds the weights of `other` in `folder`; afterwards the folder is as before."""

    def load_other(*arguments: Any) -> Any:
        (folder / WEIGHTS).rename(folder / "aside")
        shutil.copy(other / WEIGHTS, folder / WEIGHTS)
        loaded = load(*arguments)
        (folder / "aside").replace(folder / WEIGHTS)
        return loaded

    return load_other


def reference_of(overrides: list[str], world: World) -> reference.Reference:
    config, console = load_run_config(overrides), Console(None)
    run = Run(config, world, console)
    return reference.prepare_reference(run, load_inputs(run))


def fill_with_others(overrides: list[str], models: list[Path], world: World, _folder: Path) -> Any:
    with patch.object(engine, "load_reference", while_exchanged(engine.load_reference, *models)):
        reference_of(overrides, world)


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_weights_replaced_while_the_reference_loads_store_nothing(
    mode: str, overrides: list[str], models: list[Path], tmp_path: Path
) -> None:
    overrides.append(f"reference.mode={mode}")
    [outcome] = start_ranks(partial(fill_with_others, overrides, models), 1, tmp_path / "rank").finish()
    assert "changed while the model was loaded" in outcome.message, outcome.log
    assert not list((tmp_path / "store").glob("*/*.safetensors"))


def train_with_others(overrides: list[str], models: list[Path], world: World, _folder: Path) -> Any:
    policy = while_exchanged(run_module.load_policy, *models)
    config, console = load_run_config(overrides), Console(None)
    joined = contextlib.nullcontext(Run(config, world, console))
    with (
        patch.object(run_module, "load_policy", policy),
        patch.object(run_module, "open_run", lambda *_, **__: joined),
    ):
        run_module.train(config, console, StopRequest())


def test_a_policy_replaced_while_it_loads_is_not_trained(
    overrides: list[str], models: list[Path], tmp_path: Path
) -> None:
    """With the step-0 check off, which would detect it too."""
    [outcome] = start_ranks(partial(train_with_others, overrides, models), 1, tmp_path / "rank").finish()
    assert "changed while the model was loaded" in outcome.message, outcome.log
    assert not (tmp_path / "run" / "model").exists()


def on_two_nodes(world: World) -> World:
    """Return the world as if each process ran on its own host."""
    return replace(world, peers=tuple(Peer(peer.rank, f"node-{peer.rank}", peer.pid) for peer in world.peers))


def build_on_unlike_cpus(overrides: list[str], world: World, _folder: Path) -> Any:
    """Build the reference twice on nodes with different CPU instructions; return hits and computed."""
    numerics = reference.numerics_of

    def of_this_node(*arguments: Any) -> dict[str, str]:
        return {**numerics(*arguments), "cpu": f"AVX{world.rank}"}

    with patch.object(reference, "numerics_of", of_this_node):
        report = reference_of(overrides, on_two_nodes(world)).report
        again = reference_of(overrides, on_two_nodes(world)).report
    return [report["computed"], again["hits"], "peak_memory_bytes" in report, "peak_memory_bytes" in again]


def test_different_nodes_are_an_error_or_share_a_profile_with_both_values(
    overrides: list[str], tmp_path: Path
) -> None:
    unlike = partial(build_on_unlike_cpus, overrides)
    for outcome in start_ranks(unlike, 2, tmp_path / "strict").finish():
        assert "different numerics" in outcome.message, outcome.log
        assert "AVX0 on rank 0 (node-0), AVX1 on rank 1 (node-1)" in outcome.message
    assert not list((tmp_path / "store").glob("*/*.safetensors"))
    overrides.append("reference.numerics=tolerant")
    for result in run_ranks(partial(build_on_unlike_cpus, overrides), 2, tmp_path / "tolerant"):
        assert result == [8, 8, True, False]
    [fingerprint] = (tmp_path / "store").glob("*/space.json")
    assert "AVX0 or AVX1" in fingerprint.read_text()


def digest_copies(models: list[Path], store: Path, loads_whole: bool, world: World, _folder: Path) -> Any:
    files = digest_on_every_node(models[world.rank], store, False, loads_whole, on_two_nodes(world))
    files.check_unchanged()
    return [files.digest, len(files.weights)]


def test_a_node_with_other_files_than_the_first_is_an_error(models: list[Path], tmp_path: Path) -> None:
    """Weights count only on nodes that load them; configuration and code always."""
    sharded, whole = (partial(digest_copies, models, tmp_path / "store", loads) for loads in (False, True))
    first, second = run_ranks(sharded, 2, tmp_path / "sharded")
    assert first == second
    for outcome in start_ranks(whole, 2, tmp_path / "whole").finish():
        assert f"node-1 (rank 1): {WEIGHTS}" in outcome.message, outcome.log
    (models[1] / "config.json").write_text((models[1] / "config.json").read_text() + " ")
    for outcome in start_ranks(sharded, 2, tmp_path / "configured").finish():
        assert "node-1 (rank 1): config.json" in outcome.message, outcome.log
