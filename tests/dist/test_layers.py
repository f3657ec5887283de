"""Options of decoder layers change no gradient, also with sharded weights."""

import json
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.distributed.world import World
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.step import Objective
from tests.dist.scenario import Assets, all_steps, load_policy
from tests.dist.test_engine import write_whole
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

STEPS = (((0, 1, 2, 3, 4), 256), ((5,), 256), ((6, 7, 8), 256))
CHOICES = ("none", "full", 3)
# Larger than any persistent parameter is: all matrices are gathered when they are used.
HIDDEN = 96


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of full attention, and of a window that is shorter than most sequences."""
    folder = write_model(tmp_path_factory.mktemp("four_layers"), hidden_size=HIDDEN, layers=4)
    config = json.loads((folder / "config.json").read_text())
    pattern = ["full_attention", "sliding_attention"] * 2
    config |= {"use_sliding_window": True, "sliding_window": 6, "layer_types": pattern}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def norms(assets: Assets, model: Path, world: World, folder: Path) -> dict[str, list[float]]:
    """Gradient norms of `STEPS` with each choice of checkpointing; the weights after them go to `folder`."""
    objective = Objective(LossConfig(reference_free=True), ReferenceProvider())
    found = {}
    for choice in CHOICES:
        config = ModelConfig(str(model), dtype=Dtype.fp32, gradient_checkpointing=choice)
        policy = load_policy(config, world)
        found[str(choice)] = all_steps(policy, objective, assets.dataset(), world, STEPS)
        write_whole(policy, folder / f"{choice}.safetensors")
        policy.free()
    return found


def test_checkpointing_changes_no_step(assets: Assets, four_layers: Path, tmp_path: Path) -> None:
    found, _ = run_ranks(partial(norms, assets, four_layers), 2, tmp_path / "ranks")
    expected = load_file(tmp_path / "ranks" / "none.safetensors")
    for choice in ("full", "3"):
        assert found[choice] == pytest.approx(found["none"], rel=1e-6)
        got = load_file(tmp_path / "ranks" / f"{choice}.safetensors")
        for name, tensor in expected.items():
            assert (got[name] - tensor).abs().max() <= 1e-6, name
