"""The moving average of the trained weights on any number of ranks."""

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from dpo_dist.config.schema import AdapterConfig, Dtype, Offload, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.checkpoint.saver import SavedSlices
from dpo_dist.distributed.processes.world import World
from tests.dist.scenario import Assets
from tests.dist.test_checkpoint import Trainer, demand_equal, resume
from tests.support.cpu_adam import with_cpu_adam
from tests.support.ranks import run_ranks

DECAY = 0.7
STEPS = ([0, 1, 2], [3, 4, 5], [6, 7])
KEPT = 1 + len(STEPS)
BAD = 2
"""An update that is not applied comes before this step."""
ADAPTER = AdapterConfig(r=4, alpha=8.0, target_modules="all-linear")
OFFLOADED = ParallelismConfig(
    ParallelismKind.zero3, offload_optimizer=Offload.cpu, offload_parameters=Offload.cpu
)
WAYS = [
    pytest.param(Dtype.bf16, ParallelismKind.ddp, ParallelismKind.zero3, None, id="ddp in bf16, to zero3"),
    pytest.param(Dtype.fp32, OFFLOADED, ParallelismKind.zero2, ADAPTER, id="offloaded adapter, to zero2"),
]


def train(
    assets: Assets, root: Path, dtype: Dtype, adapter: AdapterConfig | None, world: World, _folder: Path
) -> None:
    trainer = Trainer(assets, world, adapter, dtype, ema_decay=DECAY)
    trainer.save(root, 0, KEPT)
    for number, rows in enumerate(STEPS, start=1):
        if number == BAD:
            backward = trainer.policy.backward
            with mock.patch.object(
                trainer.policy, "backward", lambda loss, is_last, do=backward: do(loss * torch.nan, is_last)
            ):
                assert trainer.step(rows) == torch.inf
        trainer.step(rows)
        trainer.save(root, number, KEPT)


def saved(root: Path, step: int) -> SavedSlices:
    return SavedSlices.find(root / f"step-{step:06d}")


@pytest.mark.parametrize(("dtype", "kind", "other_kind", "adapter"), WAYS)
def test_the_average_of_applied_updates_survives_a_checkpoint_and_another_world(
    dtype: Dtype,
    kind: ParallelismKind | ParallelismConfig,
    other_kind: ParallelismKind,
    adapter: AdapterConfig | None,
    assets: Assets,
    tmp_path: Path,
) -> None:
    root, again, elsewhere = tmp_path / "checkpoints", tmp_path / "again", tmp_path / "elsewhere"
    run = partial(with_cpu_adam, partial(train, assets, root, dtype, adapter))
    run_ranks(run, 2, tmp_path / "ranks", kind, dtype)
    last = len(STEPS)
    first, *later = (saved(root, step) for step in range(KEPT))
    end = later[-1]
    for name in end.shapes:
        assert torch.equal(first.whole(name, "ema"), first.whole(name))
        assert not torch.equal(end.whole(name, "ema"), end.whole(name))
        average = first.whole(name).double()
        for step in later:
            average = DECAY * average + (1 - DECAY) * step.whole(name).double()
        torch.testing.assert_close(end.whole(name, "ema").double(), average, rtol=1e-6, atol=1e-7)

    before, final = (f"step-{step:06d}" for step in (last - 1, last))
    make = partial(Trainer, assets, adapter=adapter, dtype=dtype, ema_decay=DECAY)
    going_on = partial(with_cpu_adam, partial(resume, make, root / before, STEPS[-1:], again / final))
    run_ranks(going_on, 2, tmp_path / "second", kind, dtype)
    demand_equal(saved(again, last), end, {"weight", "ema", "exp_avg", "exp_avg_sq"}, last)

    moving = partial(resume, make, root / before, STEPS[-1:], elsewhere / final)
    run_ranks(moving, 3, tmp_path / "third", other_kind, dtype)
    other, tolerance = saved(elsewhere, last), 1e-5 if dtype is Dtype.fp32 else 3e-3
    for name in end.shapes:
        torch.testing.assert_close(
            other.whole(name, "ema"), end.whole(name, "ema"), rtol=tolerance, atol=tolerance
        )
