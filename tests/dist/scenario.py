"""Shared by tests on several ranks: models and data, steps, and plain PyTorch's steps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import Dtype, ModelConfig, OptimConfig, ReferenceConfig, RunConfig
from dpo_dist.data.config import DataConfig
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import Engine, PolicyEngine, load_to_train
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.encoded.store import EncodedSource
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import RunningMeans, preference_loss
from dpo_dist.objective.metrics import MetricSums
from dpo_dist.reference import engine
from dpo_dist.reference.digest import ModelFiles
from dpo_dist.training.steps.step import Objective, train_step
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import EPS, OPTIM

PAIRS = 11
LOSS = LossConfig(beta=0.5)
# Rows of each global batch with the token budget that divides it: odd numbers, fewer pairs than ranks, one
# micro-batch and many.
STEPS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((0, 1, 2, 3, 4), 128),
    ((5,), 8192),
    ((6, 7, 8, 9, 10), 8192),
    ((2, 9), 1),
)


@dataclass(frozen=True)
class Assets:
    """Model and data folders, picklable for ranks."""

    policy: Path
    untied_policy: Path
    reference: Path
    mixture: Path
    wide: Path  # in 4 bits bitsandbytes (0.50) computes narrower layers wrongly on CPUs
    encoded: tuple[EncodedSource, ...]

    def dataset(self) -> PreferenceDataset:
        return open_dataset(self.encoded, DataConfig())

    def config(
        self, model: Path, reference: ReferenceConfig | None = None, dtype: Dtype = Dtype.fp32
    ) -> RunConfig:
        """The configuration of a run that trains `model`."""
        return RunConfig(model=ModelConfig(str(model), dtype=dtype), reference=reference or ReferenceConfig())


def load_reference(folder: Path, config: RunConfig, world: World) -> Engine:
    """The model in `folder`, loaded as the reference of a run."""
    longest = config.data.max_length
    return engine.load_reference(ModelFiles(folder, {}, {}), config.model, config.reference, longest, world)


def load_policy(
    model: Path | ModelConfig,
    world: World,
    optim: OptimConfig = OPTIM,
    *,
    seed: int = 0,
    ema_decay: float | None = None,
    max_length: int = 1024,
) -> PolicyEngine:
    """A policy in float32, or as a configuration says, with its adapter."""
    config = ModelConfig(str(model), dtype=Dtype.fp32) if isinstance(model, Path) else model
    packed = load_to_train(Path(config.path), config, max_length, world, seed)
    return PolicyEngine(packed, optim, world, ema_decay)


def one_step(
    policy: PolicyEngine,
    objective: Objective,
    dataset: PreferenceDataset,
    rows: Sequence[int],
    budget: int,
    world: World,
    *,
    costs: ComputeCosts = COSTS,
    lr: float = OPTIM.lr,
    running: RunningMeans | None = None,
) -> tuple[MetricSums, Tensor]:
    """Train on a global batch; sums of metrics, and the gradient norm."""
    plan = shard_batch(dataset, np.array(rows), world.replica, world.replicas, budget, costs)
    ready = objective.ready_step(plan, world.device)
    return train_step(policy, objective, ready, lr, world, running or RunningMeans())


def all_steps(
    policy: PolicyEngine,
    objective: Objective,
    dataset: PreferenceDataset,
    world: World,
    steps: Iterable[tuple[Sequence[int], int]] = STEPS,
    **options: Any,
) -> list[float]:
    """Gradient norms of steps."""
    return [one_step(policy, objective, dataset, *step, world, **options)[1].item() for step in steps]


@dataclass(frozen=True)
class RowsAtHand:
    """Reference log-probs by key; `spoilt` is the key of a response whose values are not finite."""

    rows: dict[bytes, Tensor]
    spoilt: bytes = b""

    @staticmethod
    def of(dataset: PreferenceDataset, values: Sequence[np.ndarray], spoilt: bytes = b"") -> "RowsAtHand":
        keys = [key.tobytes() for key in dataset.keys]
        return RowsAtHand(dict(zip(keys, map(torch.from_numpy, values), strict=True)), spoilt)

    def add_stored_logps(self, batch: PackedBatch) -> PackedBatch:
        return batch

    def token_logps(self, batch: PackedBatch) -> Tensor:
        if not len(batch.keys):
            return torch.zeros(len(batch.targets))
        keys = [key.tobytes() for key in batch.keys]
        return torch.cat([self.rows[key] * (torch.nan if key == self.spoilt else 1) for key in keys])


def plain_training(
    model: Any, losses: Iterable[Callable[[], Tensor]], optim: OptimConfig = OPTIM
) -> list[float]:
    """Gradient norms of steps by PyTorch alone, each with the mean loss of its batch."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, eps=EPS)
    norms = []
    for loss in losses:
        loss().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), optim.max_grad_norm).item())
        optimizer.step()
        model.zero_grad()
    return norms


def reference_values(
    dataset: PreferenceDataset, values: Sequence[np.ndarray], rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Reference log-probs of all tokens of the responses of `rows`, and the lengths of the responses."""
    found = [values[place] for row in rows for place in dataset.response_range(row)]
    return torch.from_numpy(np.concatenate(found)), torch.tensor([len(each) for each in found])


@torch.no_grad()
def entries_of(model: Any, dataset: PreferenceDataset) -> list[np.ndarray]:
    """Log-probs of each response by transformers alone, a sequence at a time."""
    rows = [(index, which) for index in range(len(dataset)) for which in range(2)]
    return [plain_logps(model, [dataset.example(row, (which,))]).numpy() for row, which in rows]


def plain_steps(
    model: Any,
    dataset: PreferenceDataset,
    reference: Sequence[np.ndarray],
    steps: Iterable[tuple[Sequence[int], int]] = STEPS,
    optim: OptimConfig = OPTIM,
) -> list[float]:
    """Gradient norms of steps, applied to `model` by PyTorch alone, a sequence at a time."""

    def loss(rows: Sequence[int]) -> Tensor:
        values, lengths = reference_values(dataset, reference, rows)
        logps = plain_logps(model, [dataset.example(row) for row in rows])
        sums = sum_by_response(logps, lengths), sum_by_response(values, lengths)
        return preference_loss(*sums, LOSS).mean()

    losses = [lambda rows=rows: loss(rows) for rows, _ in steps]  # type: ignore[misc]
    return plain_training(model, losses, optim)
