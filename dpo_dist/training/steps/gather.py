"""Gather values of all ranks' pairs in the global batch's order, for losses that couple the pairs."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_dist.batching.pack import copy_to_device
from dpo_dist.batching.sampler import Indices
from dpo_dist.batching.step_batch import RankBatch
from dpo_dist.distributed.processes.world import World
from dpo_dist.objective.metrics import ScoredPairs


def gather_pairs(scored: Sequence[ScoredPairs], rank_batch: RankBatch, world: World) -> ScoredPairs:
    """Return all pairs of the global batch in its order, the same on every rank; collective.

    `scored`: this rank's micro-batches, without a graph; the loss uses no rankings.
    """
    parts = [replace(pairs, routing=None, sources=None) for pairs in scored]
    columns = [torch.stack([column.double() for column in _tensors(part)]) for part in parts]
    rows = iter(in_batch_order(columns, rank_batch, world))
    gathered: ScoredPairs = _with_tensors(parts[0], lambda _: next(rows))
    sources = None if rank_batch.sources is None else on_device(rank_batch.sources, world.device)
    return replace(gathered, sources=sources)


def in_batch_order(columns: Sequence[Tensor], rank_batch: RankBatch, world: World) -> Tensor:
    """Return values of all pairs in the global batch's order, float64 [columns, pairs]; collective.

    `columns`: values of each of this rank's micro-batches, [columns, pairs].
    """
    # A sum of one value and zeros is a gather for ranks with different numbers of pairs, and exact.
    whole = torch.zeros(len(columns[0]), rank_batch.pairs, dtype=torch.float64, device=world.device)
    for part, positions in zip(columns, rank_batch.positions, strict=True):
        if positions:  # not a dummy
            whole[:, on_device(positions, world.device)] = part.double()
    return world.sum_replicas(whole)


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor changed, also tensors in the fields of dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed = {field.name: _with_tensors(getattr(value, field.name), change) for field in fields(value)}
    return replace(value, **changed)


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors of `value`, in the order in which `_with_tensors` changes them."""
    tensors: list[Tensor] = []
    _with_tensors(value, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return tensors


def on_device(numbers: Sequence[int] | Indices, device: torch.device) -> Tensor:
    """Return `numbers` as int64 [n] on `device`, without waiting for it."""
    return copy_to_device(device, np.asarray(numbers, dtype=np.int64))
