"""Options of decoder layers change no gradient, also with sharded weights."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.distributed.world import World
from dpo_dist.model.load import load_packed
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.step import Objective
from tests.dist.scenario import Assets, all_steps, load_policy
from tests.dist.test_engine import write_whole
from tests.support.packing import pack_unkeyed, random_pairs
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_are_exact_and_compiled_once(four_layers: Path) -> None:
    shapes = [[(7, 5, 9), (12, 3, 1)], [(3, 4, 5)], [(20, 3, 3), (5, 6, 7)], [(30, 2, 4)]]
    batches = [pack_unkeyed(random_pairs(lengths)) for lengths in shapes]
    cpu = torch.device("cpu")

    def losses(model: PackedCausalLM) -> list[Tensor]:
        found = []
        for batch in batches:
            model.zero_grad()
            logps = model(batch)
            logps.square().mean().backward()
            found += [logps.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        return found

    plain = load_packed(four_layers, ModelConfig(dtype=Dtype.fp32), 64, cpu).train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = ModelConfig(dtype=Dtype.fp32, compile=True, gradient_checkpointing="full")
    compiled = load_packed(four_layers, config, 64, cpu).train()
    for expected, got in zip(losses(plain), losses(compiled), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    batches += [pack_unkeyed(random_pairs([(n, n, 2 * n)])) for n in (6, 11)]
    losses(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
