"""AdamW in bf16: the same weights on any world, by any sharding, and after any resume; and its bytes."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_dist.config.schema import (
    AdapterConfig,
    Dtype,
    ModelConfig,
    OptimizerKind,
    ParallelismConfig,
    ParallelismKind,
    SumsDtype,
)
from dpo_dist.distributed.checkpoint.saver import CheckpointSaver
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import LOSS, Assets, RowsAtHand, load_policy, one_step
from tests.support.ranks import OPTIM, run_ranks
from tests.support.written import whole_weights

ROWS = ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10])
STEPS = 6
MIDDLE = 3
IN_BF16 = replace(OPTIM, kind=OptimizerKind.adamw_bf16, lr=1e-4, max_grad_norm=None)
IN_FLOAT32 = replace(IN_BF16, kind=OptimizerKind.adamw)
# Gradients are averaged in float32, so that equal ones have an exact mean.
ZERO3 = ParallelismConfig(ParallelismKind.zero3, reduce_in_float32=True)
ZERO2 = replace(ZERO3, kind=ParallelismKind.zero2)
DDP = replace(ZERO3, kind=ParallelismKind.ddp)
ADAPTER = AdapterConfig(r=4, alpha=8)


@dataclass(frozen=True)
class Job:
    """What all ranks of a world do: from the checkpoint `begins` to a step; `saves` to another one."""

    model: ModelConfig
    optim: Any
    begins: tuple[Path, int] | None = None
    ends: int = STEPS
    saves: Path | None = None
    has_fixed_gradients: bool = True
    ema_decay: float | None = None


def fix_gradients(policy: PolicyEngine, clock: list[int]) -> None:
    """Give each weight a gradient that depends on its name, its place and the step alone."""
    for name, weight in policy.causal_lm.named_parameters():
        if not weight.requires_grad:
            continue
        number = sum(map(ord, name)) * 1000

        def fixed(gradient: Tensor, number: int = number, weight: Any = weight) -> Tensor:
            generator = torch.Generator().manual_seed(number + clock[0])
            whole = getattr(weight, "whole_shape", gradient.shape)
            # Multiples of 3/32: their mean over 1, 2 or 3 equal ranks is exact in bf16, too.
            drawn = torch.randint(-40, 41, whole, generator=generator).mul(3 / 32)
            return drawn.to(gradient.dtype)

        weight.register_hook(fixed)


def train(
    assets: Assets, reference: Sequence[np.ndarray], job: Job, world: World, folder: Path
) -> dict[str, Any]:
    dataset = assets.dataset()
    policy = load_policy(job.model, world, job.optim, ema_decay=job.ema_decay)
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    clock = [0]
    if job.has_fixed_gradients:
        fix_gradients(policy, clock)
    begin = 0
    if job.begins is not None:
        checkpoint, begin = job.begins
        policy.load_shards(checkpoint)
    losses = []
    for step in range(begin, job.ends):
        clock[0] = step
        rows = ROWS[step % len(ROWS)]
        sums, _ = one_step(policy, objective, dataset, rows, 8192, world, lr=job.optim.lr)
        total = world.sum_replicas(sums.values)
        losses.append(float(total[list(sums.names).index("loss")]) / len(rows))
    weights = whole_weights(policy)
    if weights is not None:
        copies = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        save_file(copies, folder / "after.st")
        del copies
    del weights
    counted = bytes_of_tensors()
    trained = sum(getattr(weight, "ds_numel", weight.numel()) for weight in policy.causal_lm.parameters())
    if job.saves is not None:
        saver = CheckpointSaver(job.saves, 2, [policy], world)
        saver.save(job.ends, {"step": job.ends})
        saver.commit()
    return {"losses": losses, "bytes": counted / trained, "saved": policy.shards().bytes / trained}


def bytes_of_tensors() -> int:
    """Bytes of all tensors of this process that are as large as weights, each storage once."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if isinstance(each, Tensor) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(size for size in storages.values() if size >= 4096)


@dataclass(frozen=True)
class Worlds:
    """Run jobs on worlds of processes, and read the weights that they end with."""

    assets: Assets
    reference: list[np.ndarray]
    folder: Path

    def run(self, name: str, job: Job, size: int, parallelism: ParallelismConfig) -> list[dict[str, Any]]:
        scenario = partial(train, self.assets, self.reference, job)
        return run_ranks(scenario, size, self.folder / name, parallelism, Dtype.bf16, optim=job.optim)

    def after(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name / "after.st")

    def unequal(self, one: str, two: str) -> float:
        """The share of the weights that differ."""
        first, second = self.after(one), self.after(two)
        assert first.keys() == second.keys()
        differing = sum(int((first[name] != second[name]).sum()) for name in first)
        return differing / sum(tensor.numel() for tensor in first.values())

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"


@pytest.fixture
def worlds(assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path) -> Worlds:
    return Worlds(assets, plain_entries, tmp_path)


def model_of(assets: Assets, **options: Any) -> ModelConfig:
    return replace(assets.config(assets.policy, dtype=Dtype.bf16).model, **options)


def test_equal_gradients_give_equal_weights_and_the_bytes_are_those_of_the_table(worlds: Worlds) -> None:
    job = Job(model_of(worlds.assets), IN_BF16)
    limits: dict[str, tuple[int, ParallelismConfig, Callable[[int], float]]] = {
        "1 zero3": (1, ZERO3, lambda n: 8 / n),
        "2 zero3": (2, ZERO3, lambda n: 8 / n),
        "3 zero3": (3, ZERO3, lambda n: 8 / n),
        "3 zero2": (3, ZERO2, lambda n: 2 + 6 / n),
        "2 ddp": (2, DDP, lambda n: 4 + 4 / n),
    }
    for name, (size, parallelism, limit) in limits.items():
        for of_rank in worlds.run(name, job, size, parallelism):
            print(name, of_rank["bytes"], of_rank["saved"])
        assert worlds.unequal("1 zero3", name) == 0
