"""Nodes with different files or processors: an error, or one profile of the values of both."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.distributed.processes import Peer
from dpo_dist.distributed.world import World
from dpo_dist.insight.console import Console
from dpo_dist.model.numerics import numerics_of
from dpo_dist.reference.digest import digest_on_every_node
from dpo_dist.training.inputs import load_inputs
from dpo_dist.training.reference import prepare_reference
from dpo_dist.training.start import Run
from tests.support.invented import write_pairs
from tests.support.ranks import run_ranks, start_ranks
from tests.support.tiny_model import write_model


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / name, seed=seed) for seed, name in enumerate(("model", "other"))]


def on_two_nodes(world: World) -> World:
    """The world as if each process ran on its own host."""
    return replace(world, peers=tuple(Peer(peer.rank, f"node-{peer.rank}", peer.pid) for peer in world.peers))


def build_on_unlike_cpus(overrides: list[str], world: World, _folder: Path) -> Any:
    """Build the reference twice on nodes with different CPU instructions; return hits and computed."""

    def of_this_node(*arguments: Any) -> dict[str, str]:
        return {**numerics_of(*arguments), "cpu": f"AVX{world.rank}"}

    config, console, nodes = load_run_config(overrides), Console(None), on_two_nodes(world)
    run = Run(config, nodes, console)
    with patch("dpo_dist.training.reference.numerics_of", of_this_node):
        reports = [prepare_reference(run, load_inputs(run)).report for _ in range(2)]
    return [
        reports[0]["computed"],
        reports[1]["hits"],
        *("peak_memory_bytes" in report for report in reports),
    ]


def test_different_nodes_are_an_error_or_share_a_profile_with_both_values(
    models: list[Path], tmp_path: Path
) -> None:
    overrides = [
        f"model.path={models[0]}",
        "model.dtype=fp32",
        f"data.train=[{write_pairs(tmp_path / 'pairs.jsonl', 4)}]",
        f"data.cache={tmp_path / 'encoded'}",
        f"reference.store={tmp_path / 'store'}",
        f"run.dir={tmp_path / 'run'}",
    ]
    unlike = partial(build_on_unlike_cpus, overrides)
    for outcome in start_ranks(unlike, 2, tmp_path / "strict").finish():
        assert "different numerics" in outcome.message, outcome.log
        assert "AVX0 on rank 0 (node-0), AVX1 on rank 1 (node-1)" in outcome.message
    assert not list((tmp_path / "store").glob("*/*.safetensors"))
    tolerant = partial(build_on_unlike_cpus, [*overrides, "reference.numerics=tolerant"])
    for result in run_ranks(tolerant, 2, tmp_path / "tolerant"):
        assert result == [8, 8, True, False]
    [fingerprint] = (tmp_path / "store").glob("*/space.json")
    assert "AVX0 or AVX1" in fingerprint.read_text()


def digest_copies(models: list[Path], store: Path, loads_whole: bool, world: World, _folder: Path) -> Any:
    files = digest_on_every_node(models[world.rank], store, False, loads_whole, on_two_nodes(world))
    return [files.digest, len(files.weights)]


def test_a_node_with_other_files_than_the_first_is_an_error(models: list[Path], tmp_path: Path) -> None:
    """Weights count only on nodes that load them; configuration and code always."""
    sharded, whole = (partial(digest_copies, models, tmp_path / "store", loads) for loads in (False, True))
    first, second = run_ranks(sharded, 2, tmp_path / "sharded")
    assert first == second
    for outcome in start_ranks(whole, 2, tmp_path / "whole").finish():
        assert "node-1 (rank 1): model.safetensors" in outcome.message, outcome.log
    (models[1] / "config.json").write_text((models[1] / "config.json").read_text() + " ")
    for outcome in start_ranks(sharded, 2, tmp_path / "configured").finish():
        assert "node-1 (rank 1): config.json" in outcome.message, outcome.log
