"""Where a micro-batch's reference log-probs come from: the stored rows, a live engine, or nowhere."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.pack import PackedBatch
from dpo_dist.distributed.zero import FrozenEngine
from dpo_dist.reference.store import LogpStore


class ReferenceProvider(Protocol):
    """Per-token reference log-probs of a micro-batch."""

    def token_logps(self, batch: PackedBatch) -> Tensor | None:
        """float32 [targets] on the batch's device; None where the loss needs no reference."""
        ...


class NoReference:
    """`reference.mode=none`."""

    def token_logps(self, _batch: PackedBatch) -> None:
        """Nothing."""
        return


@dataclass(frozen=True)
class LiveReference:
    """`reference.mode=live`: the engine computes beside the policy."""

    engine: FrozenEngine

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Score the batch; collective under ZeRO-3."""
        return self.engine.token_logps(batch)


@dataclass(frozen=True)
class StoredReference:
    """`reference.mode=cached`: rows of the store, looked up by content."""

    store: LogpStore

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Look the batch's rows up; a dummy has none and gets zeros."""
        if not len(batch.keys):
            return torch.zeros(len(batch.targets), device=batch.targets.device)
        values = np.concatenate(self.store.read(batch.keys))
        return torch.from_numpy(values).to(batch.targets.device, non_blocking=True)
