"""AdamW with 8-bit states: close to AdamW, resumed bit for bit, and read by another world."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config.optim_schema import OptimizerKind
from dpo_dist.config.schema import Dtype, ParallelismKind
from dpo_dist.distributed.checkpoint_loading import Checkpoint, load_checkpoint
from dpo_dist.distributed.engine import SHARDS
from dpo_dist.distributed.slice_files import SavedSlices
from dpo_dist.distributed.world import World
from tests.dist.scenario import Assets
from tests.dist.test_checkpoint import Trainer
from tests.support.ranks import OPTIM, run_ranks

pytest.importorskip("bitsandbytes")
EIGHT_BIT = replace(OPTIM, kind=OptimizerKind.adamw_8bit)
STEPS = ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10])
HALF = 2
WAYS = {
    "zero3 in bf16": (Dtype.bf16, ParallelismKind.zero3),
    "zero2": (Dtype.fp32, ParallelismKind.zero2),
    "ddp in bf16": (Dtype.bf16, ParallelismKind.ddp),
}


def train(
    assets: Assets, kind: OptimizerKind, dtype: Dtype, root: Path, world: World, _folder: Path
) -> dict[str, Any]:
    """Train with checkpoints at the start, at half and at the end."""
    trainer = Trainer(assets, world, dtype=dtype, optim=replace(OPTIM, kind=kind))
    trainer.save(root, 0, 9)
    norms = []
    for number, rows in enumerate(STEPS, start=1):
        norms.append(trainer.step(rows))
        if number in (HALF, len(STEPS)):
            trainer.save(root, number, 9)
    states = trainer.policy._engine.optimizer.optimizer.state.values()
    dtypes = {
        str(value.dtype) for state in states for value in state.values() if isinstance(value, torch.Tensor)
    }
    return {"norms": norms, "8 bits": "torch.uint8" in dtypes}


def resume(assets: Assets, dtype: Dtype, root: Path, other: Path, world: World, _folder: Path) -> list[float]:
    """Continue from half in new processes; return the norms."""
    trainer = Trainer(assets, world, dtype=dtype, optim=EIGHT_BIT)
    load_checkpoint(Checkpoint(root / f"step-{HALF:06d}", {"world_size": 2}), [trainer.policy], world)
    norms = [trainer.step(rows) for rows in STEPS[HALF:]]
    trainer.save(other, len(STEPS))
    return norms


def saved(root: Path, step: int = len(STEPS)) -> SavedSlices:
    return SavedSlices.find(root / f"step-{step:06d}", SHARDS)


def distance(first: SavedSlices, second: SavedSlices, names: Sequence[str]) -> float:
    squares = [(first.whole(name) - second.whole(name)).square().sum() for name in names]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("way", WAYS)
def test_eight_bits_are_close_to_float32_and_resume_exactly(way: str, assets: Assets, tmp_path: Path) -> None:
    dtype, kind = WAYS[way]
    roots = {optimizer: tmp_path / optimizer for optimizer in OptimizerKind}
    found = {
        optimizer: run_ranks(
            partial(train, assets, optimizer, dtype, roots[optimizer]),
            2,
            tmp_path / f"{optimizer}-ranks",
            kind,
            dtype,
        )
        for optimizer in OptimizerKind
    }
    assert [one["8 bits"] for one in found[OptimizerKind.adamw_8bit]] == [True, True]
    assert not any(one["8 bits"] for one in found[OptimizerKind.adamw])
    root = roots[OptimizerKind.adamw_8bit]
    end, exact = saved(root), saved(roots[OptimizerKind.adamw])
    names = list(end.shapes)
    moved = distance(exact, saved(root, 0), names)
    assert 0 < distance(end, exact, names) < 0.1 * moved

    going_on = partial(resume, assets, dtype, root, tmp_path / "again")
    norms = run_ranks(going_on, 2, tmp_path / "second", kind, dtype)
    assert norms[0] == found[OptimizerKind.adamw_8bit][0]["norms"][HALF:]
    same = saved(tmp_path / "again")
    assert same.step == end.step == len(STEPS)
    assert {*same.parts} == {*end.parts} == {"weight", "exp_avg", "exp_avg_sq"}
    for name in names:
        assert all(torch.equal(same.whole(name, part), end.whole(name, part)) for part in end.parts)


def test_another_world_reads_them(assets: Assets, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    saving = partial(train, assets, OptimizerKind.adamw_8bit, Dtype.fp32, root)
    norms = run_ranks(saving, 2, tmp_path / "ranks", ParallelismKind.zero2)[0]["norms"]
    loading = partial(resume, assets, Dtype.fp32, root, tmp_path / "other")
    for found in run_ranks(loading, 3, tmp_path / "others", ParallelismKind.zero3):
        assert found == pytest.approx(norms[HALF:], rel=0.05)
    end, other = saved(root), saved(tmp_path / "other")
    names = list(end.shapes)
    assert distance(other, end, names) < 0.1 * distance(end, saved(root, HALF), names)
