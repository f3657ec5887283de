"""Nodes with different files of a model: an error."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.distributed.processes import Peer
from dpo_dist.distributed.world import World
from dpo_dist.reference.digest import digest_on_every_node
from tests.support.ranks import run_ranks, start_ranks
from tests.support.tiny_model import write_model


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / name, seed=seed) for seed, name in enumerate(("model", "other"))]


def on_two_nodes(world: World) -> World:
    """The world as if each process ran on its own host."""
    return replace(world, peers=tuple(Peer(peer.rank, f"node-{peer.rank}", peer.pid) for peer in world.peers))


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
