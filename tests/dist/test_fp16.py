"""Training in fp16: one loss scale on all ranks, whose overflows change nothing and are no bad steps."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_dist.config.schema import Dtype, Offload, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import LossScale
from tests.dist.scenario import Assets
from tests.dist.test_checkpoint import Trainer
from tests.support.cpu_adam import with_cpu_adam
from tests.support.precision import NEEDS_FP16
from tests.support.ranks import run_ranks

pytestmark = NEEDS_FP16
KINDS = {
    "zero3": ParallelismKind.zero3,
    "zero2": ParallelismKind.zero2,
    "ddp": ParallelismKind.ddp,
    "zero3 offloaded": ParallelismConfig(ParallelismKind.zero3, offload_optimizer=Offload.cpu),
    "zero2 offloaded": ParallelismConfig(ParallelismKind.zero2, offload_optimizer=Offload.cpu),
}
STEPS = ([0, 1, 2], [3, 4, 5], [6, 7])
LARGE = 2.0**40
"""A scale with which every gradient overflows."""
SMALL = 2.0**8
"""A scale with which none does, whatever type a CPU adds up fp16 in."""


def overflow_between(assets: Assets, world: World, _folder: Path) -> dict[str, Any]:
    """Train with overflows before each step; return the norms of its steps, and what an overflow changed."""
    trainer = Trainer(assets, world, dtype=Dtype.fp16)
    policy, norms, overflows = trainer.policy, [], []
    policy.set_loss_scale(LossScale(SMALL))
    for rows in STEPS:
        before, scale = trainer.held(), policy.loss_scale
        policy.set_loss_scale(LossScale(LARGE))
        lost = trainer.step(rows)
        assert policy.loss_scale is not None
        overflows.append([str(lost), policy.has_overflowed, policy.loss_scale.value])
        overflows[-1].append(_are_same(before, trainer.held()))
        policy.set_loss_scale(scale)
        norms.append(trainer.step(rows))
        assert not policy.has_overflowed
    return {"norms": norms, "overflows": overflows, "end": _end(trainer)}


def without_overflows(scale: float, assets: Assets, world: World, _folder: Path) -> dict[str, Any]:
    trainer = Trainer(assets, world, dtype=Dtype.fp16)
    trainer.policy.set_loss_scale(LossScale(scale))
    norms = [trainer.step(rows) for rows in STEPS]
    assert trainer.policy.loss_scale == LossScale(scale, applied=len(STEPS))
    return {"norms": norms, "end": _end(trainer)}


def _are_same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Return whether tensors are equal; optimizer states that do not exist before the first step are 0."""
    return all(torch.equal(*both) for both in zip(before, after, strict=False))


def _end(trainer: Trainer) -> list[float]:
    """Sums of what the trainer held."""
    sums = [tensor.double().sum().item() for tensor in trainer.held()]
    trainer.policy.free()
    return sums


def every_way(assets: Assets, world: World, folder: Path) -> list[dict[str, Any]]:
    ways = overflow_between, partial(without_overflows, SMALL), partial(without_overflows, SMALL / 2)
    return [way(assets, world, folder) for way in ways]


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_changes_nothing_on_any_rank_and_halves_the_scale(
    kind: str, assets: Assets, tmp_path: Path
) -> None:
    scenario = partial(with_cpu_adam, partial(every_way, assets))
    found = run_ranks(scenario, 2, tmp_path / "ranks", KINDS[kind], Dtype.fp16)
    for with_overflows, plain, smaller in found:
        assert with_overflows["overflows"] == [["inf", True, LARGE / 2, True]] * len(STEPS)
        assert with_overflows["norms"] == plain["norms"]
        assert with_overflows["end"] == plain["end"]
        assert smaller["norms"] == pytest.approx(plain["norms"], rel=1e-3)


def at_the_lowest(assets: Assets, world: World, _folder: Path) -> list[Any]:
    """Return what a step of a loss that is not a number is, at the lowest scale."""
    trainer = Trainer(assets, world, dtype=Dtype.fp16)
    trainer.policy.set_loss_scale(LossScale(1.0))
    backward = trainer.policy.backward
    trainer.policy.backward = lambda loss, is_last: backward(loss * torch.nan, is_last)  # type: ignore[method-assign]
    return [str(trainer.step(STEPS[0])), trainer.policy.has_overflowed]


def test_at_the_lowest_scale_an_overflow_is_a_bad_step(assets: Assets, tmp_path: Path) -> None:
    for found in run_ranks(partial(at_the_lowest, assets), 2, tmp_path / "ranks", dtype=Dtype.fp16):
        assert found == ["inf", False]
