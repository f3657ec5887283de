"""AdamW with 8-bit states: close to AdamW, and resumed bit for bit by the same world."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config.schema import AdapterConfig, Dtype, OptimizerKind, ParallelismKind
from dpo_dist.distributed.checkpoint import SavedSlices
from dpo_dist.distributed.slices import SHARDS
from dpo_dist.distributed.world import World
from tests.dist.scenario import Assets
from tests.dist.test_checkpoint import Trainer, demand_equal, resume
from tests.support.ranks import OPTIM, run_ranks, start_ranks

pytest.importorskip("bitsandbytes")
STEPS = ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10])
HALF = 2


# A parallelism, and what a trainer has.
WAYS: dict[str, tuple[ParallelismKind, dict[str, Any]]] = {
    "zero3 in bf16": (ParallelismKind.zero3, {"dtype": Dtype.bf16}),
    "zero2 with an adapter and an average": (
        ParallelismKind.zero2,
        {"adapter": AdapterConfig(r=8, alpha=16.0), "ema_decay": 0.7},
    ),
}


def trainer_of(optimizer: OptimizerKind, assets: Assets, options: dict[str, Any], world: World) -> Trainer:
    return Trainer(assets, world, optim=replace(OPTIM, kind=optimizer), **options)


def train(
    assets: Assets, options: dict[str, Any], root: Path, world: World, _folder: Path
) -> dict[str, list[float]]:
    """Train with each optimizer, with checkpoints at the start, at half and at the end; gradient norms."""
    norms = {}
    for kind in OptimizerKind:
        trainer = trainer_of(kind, assets, options, world)
        trainer.save(root / kind, 0, 9)
        norms[kind.value] = []
        for number, rows in enumerate(STEPS, start=1):
            norms[kind.value].append(trainer.step(rows))
            if number in (HALF, len(STEPS)):
                trainer.save(root / kind, number, 9, is_last=number == len(STEPS))
        states = trainer.policy._engine.optimizer.optimizer.state.values()
        values = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        assert any(value.dtype is torch.uint8 for value in values) is (kind is OptimizerKind.adamw_8bit)
        trainer.policy.free()
    return norms


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def saved(root: Path, step: int = len(STEPS)) -> SavedSlices:
    return SavedSlices.find(step_folder(root, step), SHARDS)


def distance(first: SavedSlices, second: SavedSlices, names: Sequence[str]) -> float:
    squares = [(first.whole(name) - second.whole(name)).square().sum() for name in names]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("name", WAYS)
def test_eight_bits_are_close_to_float32_and_resume_exactly(
    name: str, assets: Assets, tmp_path: Path
) -> None:
    (kind, options), root = WAYS[name], tmp_path / "checkpoints"
    dtype = options.get("dtype", Dtype.fp32)
    root.mkdir()
    found = run_ranks(partial(train, assets, options, root), 2, tmp_path / "ranks", kind, dtype)
    end, exact = (saved(root / optimizer) for optimizer in (OptimizerKind.adamw_8bit, OptimizerKind.adamw))
    names = list(end.shapes)
    moved = distance(exact, saved(root / OptimizerKind.adamw_8bit, 0), names)
    assert 0 < distance(end, exact, names) < 0.1 * moved

    half = step_folder(root / OptimizerKind.adamw_8bit, HALF)
    make = partial(trainer_of, OptimizerKind.adamw_8bit, assets, options)
    going_on = partial(resume, make, half, STEPS[HALF:], step_folder(tmp_path / "again", len(STEPS)))
    norms = run_ranks(going_on, 2, tmp_path / "second", kind, dtype)
    assert norms[0] == found[0][OptimizerKind.adamw_8bit][HALF:]
    parts = {"weight", "ema"} if "ema_decay" in options else {"weight"}
    demand_equal(saved(tmp_path / "again"), end, parts, len(STEPS))
    if kind is ParallelismKind.zero2:
        alone = partial(resume, make, half, STEPS[HALF:], step_folder(tmp_path / "one", len(STEPS)))
        (other,) = start_ranks(alone, 1, tmp_path / "alone", kind).finish()
        assert other.error == "CheckpointError", other.log
        assert "as many processes" in other.message
