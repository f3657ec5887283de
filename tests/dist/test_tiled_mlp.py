"""Ranks that compute MLPs by tiles, as many as their own tokens need, train as one process without tiles."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig, ParallelismKind, Quantization
from dpo_dist.distributed.processes.world import World
from dpo_dist.model import tiled_mlp
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import LOSS, Assets, RowsAtHand, all_steps, load_policy
from tests.dist.test_engine import write_whole
from tests.dist.test_families import forget, write_families
from tests.support.ranks import run_ranks

ZERO3, ZERO2, DDP = ParallelismKind
WHOLE = 2**20
# Several micro-batches of unequal lengths, and a rank without a pair.
STEPS = (((0, 1, 2), 160), ((5,), 8192))
CHECKPOINTED: dict[str, Any] = {"dtype": Dtype.fp32, "gradient_checkpointing": "full", "tiled_mlp": True}


def walk(
    models: dict[str, ModelConfig],
    tile: int,
    assets: Assets,
    reference: Sequence[np.ndarray],
    world: World,
    folder: Path,
) -> dict[str, list[float]]:
    """Gradient norms of each model; writes the trained weights."""
    tiled_mlp.TILE_ROWS = tile
    dataset = assets.dataset()
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    norms = {}
    for name, config in models.items():
        policy = load_policy(config, world, max_length=512)
        norms[name] = all_steps(policy, objective, dataset, world, STEPS)
        policy.check_gradients()
        write_whole(policy, folder / f"{name}.safetensors")
        forget(policy, world)
    return norms


def demand_equal(
    models: dict[str, ModelConfig],
    kind: ParallelismKind,
    assets: Assets,
    reference: Sequence[np.ndarray],
    folder: Path,
) -> None:
    both = run_ranks(partial(walk, models, 8, assets, reference), 2, folder / "both", kind, seconds=400)
    [alone] = run_ranks(partial(walk, models, WHOLE, assets, reference), 1, folder / "alone", DDP)
    for name in models:
        for of_rank in both:
            assert np.allclose(of_rank[name], alone[name], rtol=1e-4), name
        weights, expected = (load_file(folder / run / f"{name}.safetensors") for run in ("both", "alone"))
        assert weights.keys() == expected.keys()
        largest = max(float((weights[each] - expected[each]).abs().max()) for each in weights)
        assert largest < 1e-6, name


def test_weights_that_zero3_shards(assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path) -> None:
    """With a norm behind the MLP, recurrent layers, a dense layer of a mixture; and adapters."""
    names = "gemma3_text qwen3_5_text qwen3_moe"
    folders = {"llama": assets.policy, **write_families(names, tmp_path)}
    models = {name: ModelConfig(str(folder), **CHECKPOINTED) for name, folder in folders.items()}
    for name, targets in (("an adapter", None), ("an adapter of MLPs", ["up_proj", "down_proj"])):
        adapter = AdapterConfig(r=2, alpha=4.0, target_modules=targets)
        models[name] = ModelConfig(str(assets.policy), adapter=adapter, **CHECKPOINTED)
    demand_equal(models, ZERO3, assets, plain_entries, tmp_path)


def test_gradients_that_zero2_reduces(
    assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    models = {"whole": ModelConfig(str(assets.policy), **CHECKPOINTED)}
    models["an adapter"] = ModelConfig(str(assets.policy), adapter=AdapterConfig(r=2), **CHECKPOINTED)
    demand_equal(models, ZERO2, assets, plain_entries, tmp_path)


def test_an_adapter_on_weights_in_4_bits(
    assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    adapted = {"adapter": AdapterConfig(r=2), "quantization": Quantization.nf4}
    models = {"nf4": ModelConfig(str(assets.wide), **adapted, **CHECKPOINTED)}
    demand_equal(models, DDP, assets, plain_entries, tmp_path)
