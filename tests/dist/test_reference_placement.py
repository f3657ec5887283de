"""A reference in memory, in host memory or quantized: its files, log-probs, and what is left."""

import gc
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.schema import Offload, Quantization, ReferenceConfig
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import FrozenEngine
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.reference.digest import digest_model, digest_on_every_node
from tests.dist.scenario import Assets, load_reference
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model


def tensor_bytes() -> int:
    """The memory of all floating-point tensors of this process, ZeRO-3 shards included."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    tensors += [tensor.ds_tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def come_and_go(assets: Assets, model: Path, world: World, _folder: Path) -> list[Any]:
    """Score twice by an offloaded reference; log-probs, and bytes in memory before, while and after."""
    config = assets.config(model, ReferenceConfig(offload=Offload.cpu))
    found = []
    for _ in range(2):
        before = tensor_bytes()
        engine = load_reference(model, config, world)
        [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
        # DeepSpeed remembers the order of its first passes.
        scored = [engine.token_logps(batch).tolist() for _ in range(3)]
        del batch
        loaded = tensor_bytes()
        world.barrier()
        engine.free()
        found.append([scored, [before, loaded, tensor_bytes()]])
    return found


def test_an_offloaded_reference_scores_and_leaves_nothing_behind(assets: Assets, tmp_path: Path) -> None:
    # All matrices of a layer are above 1 MB on each rank, below which DeepSpeed keeps them in memory.
    model = write_model(tmp_path / "model", hidden_size=1536, intermediate_size=2048, layers=1)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    with torch.no_grad():
        wanted = plain_logps(plain, [assets.dataset().example(row) for row in range(4)])
    for of_rank in run_ranks(partial(come_and_go, assets, model), 2, tmp_path / "ranks"):
        for scored, (before, loaded, after) in of_rank:
            for logps in scored:
                torch.testing.assert_close(torch.tensor(logps), wanted, atol=1e-4, rtol=0)
            assert loaded - before > 0.4 * weights
            assert after == before


def quantize(assets: Assets, world: World, _folder: Path) -> list[float]:
    """Drifts of quantized references from the unquantized one."""
    [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
    in_full = load_reference(assets.wide, assets.config(assets.wide), world).token_logps(batch)
    drifts = []
    for quantization in Quantization:
        config = assets.config(assets.wide, ReferenceConfig(quantization=quantization))
        engine = load_reference(assets.wide, config, world)
        assert not isinstance(engine, FrozenEngine), "whole on every rank"
        drifts.append(float((engine.token_logps(batch) - in_full).abs().mean()))
    return drifts


def test_a_quantized_reference_is_close(assets: Assets, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for drifts in run_ranks(partial(quantize, assets), 2, tmp_path / "ranks"):
        assert all(1e-4 < drift < 0.5 for drift in drifts)


def digest_copies(models: list[Path], store: Path, world: World, _folder: Path) -> list[Any]:
    """What ranks on two nodes, each with its own copy of a model, say of weights and of configurations."""
    peers = tuple(replace(peer, host=f"node-{peer.rank}", place=f"node {peer.rank}") for peer in world.peers)
    on_two_nodes = replace(world, peers=peers)

    def digest(loads_whole: bool) -> str:
        try:
            return digest_on_every_node(models[world.rank], store, False, loads_whole, on_two_nodes).digest
        except ReferenceModelError as error:
            return error.got

    found = [digest(loads_whole=False), digest(loads_whole=True)]
    if world.rank == 1:
        (models[1] / "config.json").write_text((models[1] / "config.json").read_text() + " ")
    return [*found, digest(loads_whole=False)]


def test_a_node_with_other_files_than_the_first_is_an_error(tmp_path: Path) -> None:
    """Weights count only on nodes that load them; configuration and code always."""
    models = [write_model(tmp_path / name, seed=seed) for seed, name in enumerate(("model", "other"))]
    own = digest_model(models[0]).digest
    scenario = partial(digest_copies, models, tmp_path / "store")
    for found in run_ranks(scenario, 2, tmp_path / "ranks"):
        assert found[0] == own
        for name, differing in zip(("model.safetensors", "config.json"), found[1:], strict=True):
            assert re.fullmatch(rf"{name}: \w+ on rank 0 \(node-0\); \w+ on rank 1 \(node-1\)", differing)
