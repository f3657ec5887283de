"""A reference in memory, in host memory, on a disk or quantized: its files, log-probs, and what is left."""

import gc
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import Offload, Quantization, ReferenceConfig
from dpo_dist.data.encoded.dataset import shard_batch
from dpo_dist.distributed.deepspeed_config import nvme_folder
from dpo_dist.distributed.join import check_async_io, load_async_io
from dpo_dist.distributed.world import Peer, World
from dpo_dist.distributed.zero import FrozenEngine
from dpo_dist.foundation.errors import ConfigError, ReferenceModelError
from dpo_dist.reference.digest import digest_model, digest_on_every_node
from tests.dist.scenario import Assets, load_reference
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

HAS_ASYNC_IO = AsyncIOBuilder().is_compatible(verbose=False)
NEEDS_ASYNC_IO = pytest.mark.skipif(not HAS_ASYNC_IO, reason="needs libaio")


def tensor_bytes() -> int:
    """The memory of all floating-point tensors of this process, ZeRO-3 shards included."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    tensors += [tensor.ds_tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def come_and_go(assets: Assets, offload: Offload, model: Path, world: World, folder: Path) -> list[Any]:
    """Score twice; the log-probs, bytes on the disk, and bytes in memory before, while and after."""
    nvme = folder / "nvme"
    path = str(nvme) if offload is Offload.nvme else None
    config = assets.config(model, ReferenceConfig(offload=offload, nvme_path=path))
    found = []
    for _ in range(2):
        before = tensor_bytes()
        engine = load_reference(model, config, world)
        on_disk = sum(file.stat().st_size for file in nvme.rglob("*.tensor.swp"))
        [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
        # DeepSpeed remembers the order of its first passes.
        scored = [engine.token_logps(batch).tolist() for _ in range(3)]
        del batch
        loaded = tensor_bytes()
        world.barrier()
        engine.free()
        world.barrier()
        left = [path.name for path in nvme.iterdir()] if nvme.exists() else []
        found.append([scored, on_disk, left, [before, loaded, tensor_bytes()]])
    return found


@pytest.mark.parametrize("offload", [Offload.cpu, pytest.param(Offload.nvme, marks=NEEDS_ASYNC_IO)])
def test_an_offloaded_reference_scores_and_leaves_nothing_behind(
    offload: Offload, assets: Assets, tmp_path: Path
) -> None:
    if offload is Offload.nvme:
        load_async_io(print)  # compiled once: ranks that compile it at the same time wait for minutes
    # All matrices of a layer are above 1 MB on each rank, below which DeepSpeed keeps them in memory.
    model = write_model(tmp_path / "model", hidden_size=1536, intermediate_size=2048, layers=1)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    with torch.no_grad():
        wanted = plain_logps(plain, [assets.dataset().example(row) for row in range(4)])
    for of_rank in run_ranks(partial(come_and_go, assets, offload, model), 2, tmp_path / "ranks"):
        for scored, on_disk, left, (before, loaded, after) in of_rank:
            for logps in scored:
                torch.testing.assert_close(torch.tensor(logps), wanted, atol=1e-4, rtol=0)
            if offload is Offload.nvme:
                assert on_disk >= 3 * 1536 * 2048 * 4
            else:
                assert loaded - before > 0.4 * weights
            assert left == []
            assert after - before <= 2  # DeepSpeed keeps one half-precision number for NVMe


@pytest.mark.skipif(HAS_ASYNC_IO, reason="DeepSpeed's async_io can be built here")
def test_without_async_io_nvme_is_refused() -> None:
    with pytest.raises(ConfigError, match="async_io") as caught:
        check_async_io()
    assert caught.value.where == "reference.offload"


def test_each_process_has_its_folder_and_those_of_dead_ones_are_removed(tmp_path: Path) -> None:
    peers = (Peer(0, "host", os.getpid(), ""), Peer(1, "host", os.getppid(), ""))
    living, dead = (tmp_path / f"dpo_dist-host-{pid}" for pid in (1, 2**22 + 1))
    living.mkdir()
    dead.mkdir()
    worlds = [World(None, rank, 2, torch.device("cpu"), peers) for rank in (0, 1)]
    own = {nvme_folder(str(tmp_path), world) for world in worlds}
    assert len(own) == 2
    assert {*tmp_path.iterdir()} == {living, *own}
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be created"):
        nvme_folder(str(tmp_path / "file"), worlds[0])


def quantize(assets: Assets, world: World, _folder: Path) -> list[float]:
    """Drifts of quantized references from the unquantized one."""
    [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
    in_full = load_reference(assets.policy, assets.config(assets.policy), world).token_logps(batch)
    drifts = []
    for quantization in Quantization:
        config = assets.config(assets.policy, ReferenceConfig(quantization=quantization))
        engine = load_reference(assets.policy, config, world)
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
        assert found == [own, "node-1 (rank 1): model.safetensors", "node-1 (rank 1): config.json"]
