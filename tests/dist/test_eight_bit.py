"""AdamW with 8-bit states: close to AdamW, and resumed bit for bit by the same world."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config.schema import AdapterConfig, Dtype, OptimizerKind, ParallelismKind
from dpo_dist.distributed.checkpoint import Checkpoint, SavedSlices, load_checkpoint
from dpo_dist.distributed.slices import SHARDS
from dpo_dist.distributed.world import World
from tests.dist.scenario import Assets
from tests.dist.test_checkpoint import Trainer
from tests.support.precision import NEEDS_FP16
from tests.support.ranks import OPTIM, run_ranks, start_ranks

pytest.importorskip("bitsandbytes")
STEPS = ([0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10])
HALF = 2
ADAPTER = AdapterConfig(r=8, alpha=16.0, target_modules="all-linear")


@dataclass(frozen=True)
class Way:
    """A precision, a parallelism, and what else a trainer has."""

    dtype: Dtype
    kind: ParallelismKind
    adapter: AdapterConfig | None = None
    ema_decay: float | None = None

    def trainer(self, assets: Assets, world: World, optimizer: OptimizerKind) -> Trainer:
        optim = replace(OPTIM, kind=optimizer)
        return Trainer(assets, world, self.adapter, dtype=self.dtype, ema_decay=self.ema_decay, optim=optim)

    @property
    def parts(self) -> set[str]:
        average = set() if self.ema_decay is None else {"ema"}
        return {"weight"} | average


WAYS = {
    "zero3 in bf16": Way(Dtype.bf16, ParallelismKind.zero3),
    "zero2 with an adapter": Way(Dtype.fp32, ParallelismKind.zero2, adapter=ADAPTER),
    "ddp in bf16": Way(Dtype.bf16, ParallelismKind.ddp),
    "zero3 in fp16 with an adapter and an average": Way(Dtype.fp16, ParallelismKind.zero3, ADAPTER, 0.7),
    "zero2 in fp16 with an average": Way(Dtype.fp16, ParallelismKind.zero2, ema_decay=0.7),
}


def train(
    assets: Assets, way: Way, kind: OptimizerKind, root: Path, world: World, _folder: Path
) -> dict[str, Any]:
    """Train with checkpoints at the start, at half and at the end."""
    trainer = way.trainer(assets, world, kind)
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


def resume(
    assets: Assets,
    way: Way,
    found: Path,
    ranks: int,
    steps: int,
    other: Path,
    world: World,
    _folder: Path,
) -> list[float]:
    """Continue a checkpoint of so many ranks in new processes for so many steps; return the norms."""
    trainer = way.trainer(assets, world, OptimizerKind.adamw_8bit)
    load_checkpoint(Checkpoint(found, {"world_size": ranks}), [trainer.policy], world)
    done = int(found.name.removeprefix("step-"))
    norms = [trainer.step(rows) for rows in STEPS[done : done + steps]]
    trainer.save(other, done + steps)
    return norms


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def saved(root: Path, step: int = len(STEPS)) -> SavedSlices:
    return SavedSlices.find(step_folder(root, step), SHARDS)


def distance(first: SavedSlices, second: SavedSlices, names: Sequence[str]) -> float:
    squares = [(first.whole(name) - second.whole(name)).square().sum() for name in names]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEEDS_FP16 if WAYS[name].dtype is Dtype.fp16 else ()) for name in WAYS]
)
def test_eight_bits_are_close_to_float32_and_resume_exactly(
    name: str, assets: Assets, tmp_path: Path
) -> None:
    way = WAYS[name]
    roots = {optimizer: tmp_path / optimizer for optimizer in OptimizerKind}
    found = {
        optimizer: run_ranks(
            partial(train, assets, way, optimizer, roots[optimizer]),
            2,
            tmp_path / f"{optimizer}-ranks",
            way.kind,
            way.dtype,
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

    going_on = partial(resume, assets, way, step_folder(root, HALF), 2, 2, tmp_path / "again")
    norms = run_ranks(going_on, 2, tmp_path / "second", way.kind, way.dtype)
    assert norms[0] == found[OptimizerKind.adamw_8bit][0]["norms"][HALF:]
    same = saved(tmp_path / "again")
    assert same.step == end.step == len(STEPS)
    assert {*same.parts} == {*end.parts} == way.parts
    for weight in names:
        assert all(torch.equal(same.whole(weight, part), end.whole(weight, part)) for part in end.parts)


def test_another_world_is_one_error(assets: Assets, tmp_path: Path) -> None:
    root, way = tmp_path / "checkpoints", Way(Dtype.fp32, ParallelismKind.zero2)
    run_ranks(partial(train, assets, way, OptimizerKind.adamw_8bit, root), 2, tmp_path / "ranks", way.kind)
    alone = partial(resume, assets, way, step_folder(root, HALF), 2, 1, tmp_path / "one")
    (found,) = start_ranks(alone, 1, tmp_path / "alone", way.kind).finish()
    assert found.error == "CheckpointError", found.log
    assert "as many processes" in found.message
