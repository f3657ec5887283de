"""The reference's memory is freed once the store is filled, wherever its weights were."""

import gc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import Offload, ReferenceConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import FrozenEngine
from dpo_dist.insight.console import Console
from dpo_dist.reference.engine import load_reference
from dpo_dist.training.inputs import load_inputs
from dpo_dist.training.reference import prepare_reference
from dpo_dist.training.start import Run
from tests.dist.scenario import Assets, files_of
from tests.support.invented import write_pairs
from tests.support.packing import COSTS
from tests.support.ranks import run_ranks

HAS_ASYNC_IO = AsyncIOBuilder().is_compatible(verbose=False)


def tensor_bytes() -> int:
    """Return the memory of all floating-point tensors of this process, ZeRO-3 shards included."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    tensors += [tensor.ds_tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def come_and_go(assets: Assets, offload: Offload, world: World, folder: Path) -> list[list[int]]:
    nvme = str(folder / "nvme") if offload is Offload.nvme else None
    config = assets.config(assets.policy, ReferenceConfig(offload=offload, nvme_path=nvme))
    sizes = []
    for _ in range(2):
        before = tensor_bytes()
        engine = load_reference(files_of(assets.reference), config, world)
        [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
        for _ in range(3):  # DeepSpeed remembers the order of its first passes
            engine.token_logps(batch)
        del batch
        loaded = tensor_bytes()
        engine.free()
        sizes.append([before, loaded, tensor_bytes()])
    return sizes


NVME = pytest.param(Offload.nvme, marks=pytest.mark.skipif(not HAS_ASYNC_IO, reason="needs libaio"))


@pytest.mark.parametrize("offload", [Offload.none, Offload.cpu, NVME])
def test_a_freed_engine_leaves_no_weights_behind(offload: Offload, assets: Assets, tmp_path: Path) -> None:
    weights = sum(f.stat().st_size for f in assets.reference.glob("*.safetensors"))
    for rank in run_ranks(partial(come_and_go, assets, offload), 2, tmp_path / "ranks"):
        for before, loaded, after in rank:
            assert loaded - before > 0.4 * weights
            assert after - before <= 2  # DeepSpeed keeps one half-precision number for NVMe


def fill_a_store(overrides: list[str], world: World, _folder: Path) -> dict[str, Any]:
    config, console = load_run_config(overrides), Console(None)
    run = Run(config, world, console)
    inputs = load_inputs(run)
    free, filled = FrozenEngine.free, []

    def weigh_and_free(engine: FrozenEngine) -> None:
        filled.append(tensor_bytes())
        free(engine)

    FrozenEngine.free = weigh_and_free
    before = tensor_bytes()
    reference = prepare_reference(run, inputs)
    return {
        "computed": reference.report["computed"],
        "grown": filled[0] - before,
        "left": tensor_bytes() - before,
    }


def test_filling_a_store_leaves_no_tensor_behind(assets: Assets, tmp_path: Path) -> None:
    overrides = [
        f"model.path={assets.policy}",
        f"reference.path={assets.reference}",
        "model.dtype=fp32",
        f"data.train=[{write_pairs(tmp_path / 'pairs.jsonl', 8)}]",
        f"data.cache={tmp_path / 'encoded'}",
        f"reference.store={tmp_path / 'store'}",
    ]
    for result in run_ranks(partial(fill_a_store, overrides), 2, tmp_path / "ranks"):
        assert result["computed"] == 16
        assert result["grown"] > 0
        assert result["left"] == 0
