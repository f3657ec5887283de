"""What is done to decoder layers changes no gradient, also where their weights are sharded."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from dpo_dist.config.schema import Dtype, LossConfig, ModelConfig, ParallelismKind
from dpo_dist.data.batches import plan_step
from dpo_dist.distributed.runtime import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.layers import decoder_layers
from dpo_dist.model.load import load_packed
from dpo_dist.reference.provider import NoReference
from dpo_dist.training.step import Objective, train_step
from tests.dist.scenario import Assets
from tests.dist.test_engine import write_whole
from tests.support.ranks import OPTIM, run_ranks
from tests.support.tiny_model import write_model

STEPS = ((0, 1, 2, 3, 4), (5,), (6, 7, 8))
# Larger than any persistent parameter is: all matrices are gathered when they are used.
HIDDEN = 96


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("four_layers"), hidden_size=HIDDEN, layers=4)


def norms(assets: Assets, model: ModelConfig, world: World, folder: Path) -> list[float]:
    """Gradient norms of `STEPS`; the weights after them go to `folder`."""
    dataset = assets.dataset()
    policy = PolicyEngine(load_packed(Path(model.path), model, 1024, world.device), OPTIM, world)
    objective = Objective(LossConfig(reference_free=True), NoReference())
    found = []
    for rows in STEPS:
        plan = plan_step(dataset, np.array(rows), world.rank, world.size, 256)
        found.append(train_step(policy, objective, plan, OPTIM.lr, world.device)[1])
    write_whole(policy, folder / "weights.safetensors")
    return found


def outcome(
    assets: Assets, model: Path, kind: ParallelismKind, folder: Path, **options: Any
) -> tuple[list[float], dict[str, Tensor]]:
    config = ModelConfig(str(model), dtype=Dtype.fp32, **options)
    told = run_ranks(partial(norms, assets, config), 2, folder, kind)
    return told[0], load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("kind", [ParallelismKind.zero3, ParallelismKind.ddp])
def test_checkpointing_changes_no_step(
    kind: ParallelismKind, assets: Assets, four_layers: Path, tmp_path: Path
) -> None:
    expected_norms, expected = outcome(assets, four_layers, kind, tmp_path / "none")
    for choice in ("full", 3):
        got_norms, got = outcome(
            assets, four_layers, kind, tmp_path / str(choice), gradient_checkpointing=choice
        )
        assert got_norms == pytest.approx(expected_norms, rel=1e-6)
        for name, tensor in expected.items():
            assert (got[name] - tensor).abs().max() <= 1e-6, name
