"""AdamW with 8-bit states: close to AdamW, and resumed bit for bit by the same world."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
    "zero2 with an adapter and an average": Way(Dtype.fp32, ParallelismKind.zero2, ADAPTER, 0.7),
}


def train(assets: Assets, way: Way, root: Path, world: World, _folder: Path) -> dict[str, list[float]]:
    """Train with each optimizer, with checkpoints at the start, at half and at the end; gradient norms."""
    norms = {}
    for kind in OptimizerKind:
        trainer = way.trainer(assets, world, kind)
        trainer.save(root / kind, 0, 9)
        norms[kind.value] = []
        for number, rows in enumerate(STEPS, start=1):
            norms[kind.value].append(trainer.step(rows))
            if number in (HALF, len(STEPS)):
                trainer.save(root / kind, number, 9)
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
    way, root = WAYS[name], tmp_path / "checkpoints"
    root.mkdir()
    found = run_ranks(partial(train, assets, way, root), 2, tmp_path / "ranks", way.kind, way.dtype)
    end, exact = (saved(root / kind) for kind in (OptimizerKind.adamw_8bit, OptimizerKind.adamw))
    names = list(end.shapes)
    moved = distance(exact, saved(root / OptimizerKind.adamw_8bit, 0), names)
    assert 0 < distance(end, exact, names) < 0.1 * moved

    half = step_folder(root / OptimizerKind.adamw_8bit, HALF)
    make = partial(way.trainer, assets, optimizer=OptimizerKind.adamw_8bit)
    going_on = partial(resume, make, half, STEPS[HALF:], step_folder(tmp_path / "again", len(STEPS)))
    norms = run_ranks(going_on, 2, tmp_path / "second", way.kind, way.dtype)
    assert norms[0] == found[0][OptimizerKind.adamw_8bit][HALF:]
    demand_equal(saved(tmp_path / "again"), end, way.parts, len(STEPS))
    if way.adapter is not None:
        alone = partial(resume, make, half, STEPS[HALF:], step_folder(tmp_path / "one", len(STEPS)))
        (other,) = start_ranks(alone, 1, tmp_path / "alone", way.kind).finish()
        assert other.error == "CheckpointError", other.log
        assert "as many processes" in other.message
