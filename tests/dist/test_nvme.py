"""A reference with weights on a disk scores like one in memory, and leaves no files."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import Offload, ReferenceConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.kernels import check_async_io, own_folder
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.reference.engine import load_reference
from tests.dist.scenario import Assets, files_of
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

HAS_ASYNC_IO = AsyncIOBuilder().is_compatible(verbose=False)


def score_from_disk(assets: Assets, model: Path, nvme: Path, world: World, _folder: Path) -> dict[str, Any]:
    config = assets.config(model, ReferenceConfig(offload=Offload.nvme, nvme_path=str(nvme)))
    engine = load_reference(files_of(model), config, world)
    on_disk = sum(file.stat().st_size for file in nvme.rglob("*.tensor.swp"))
    [batch] = shard_batch(assets.dataset(), np.arange(4), 0, 1, 8192, COSTS).batches()
    scored = [engine.token_logps(batch).tolist() for _ in range(2)]
    world.barrier()
    engine.free()
    world.barrier()
    return {"scored": scored, "on disk": on_disk, "left": [path.name for path in nvme.iterdir()]}


@pytest.mark.skipif(not HAS_ASYNC_IO, reason="needs libaio")
def test_weights_on_a_disk_score_like_those_in_memory(assets: Assets, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", hidden_size=512, intermediate_size=2048, layers=1)
    nvme = tmp_path / "nvme"
    results = run_ranks(partial(score_from_disk, assets, model, nvme), 2, tmp_path / "ranks")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        wanted = plain_logps(plain, [assets.dataset().sequences(row) for row in range(4)])
    for of_rank in results:
        for scored in of_rank["scored"]:
            torch.testing.assert_close(torch.tensor(scored), wanted, atol=1e-4, rtol=0)
        assert of_rank["on disk"] >= 3 * 512 * 2048 * 4
        assert of_rank["left"] == []


@pytest.mark.skipif(HAS_ASYNC_IO, reason="DeepSpeed's async_io can be built here")
def test_without_async_io_nvme_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check_async_io()
    assert caught.value.where == "reference.offload"
    assert "libaio" in str(caught.value.remedy)


def make_folders(nvme: Path, world: World, _folder: Path) -> list[str]:
    host = world.peers[0].host
    world.on_main(lambda: [(nvme / f"dpo_dist-{host}-{pid}").mkdir(parents=True) for pid in (1, 2**22 + 1)])
    own = own_folder(str(nvme), world)
    world.barrier()
    assert own.is_dir()
    (nvme / "file").touch()
    with pytest.raises(ConfigError):
        own_folder(str(nvme / "file"), world)
    return sorted(path.name.rpartition("-")[2] for path in nvme.glob("dpo_dist-*"))


def test_each_process_has_its_folder_and_those_of_dead_ones_are_removed(tmp_path: Path) -> None:
    results = run_ranks(partial(make_folders, tmp_path / "nvme"), 2, tmp_path / "ranks")
    assert results[0] == results[1]
    assert len(results[0]) == 3
    assert "1" in results[0]
    assert str(2**22 + 1) not in results[0]
