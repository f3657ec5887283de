"""Where a micro-batch's reference log-probs come from: stored rows, a model, or nowhere."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.reference.engine import ReferenceEngine
from dpo_dist.reference.store import LogpStore


class ReferenceProvider(Protocol):
    """Per-token reference log-probs of a micro-batch."""

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """The batch, still on the host, with what is known of it without a model; from any thread."""
        ...

    def token_logps(self, batch: PackedBatch) -> Tensor | None:
        """Of a batch that went through `attach`: float32 [targets] on its device; None where the loss needs
        no reference.
        """
        ...


class NoReference:
    """`reference.mode=none`."""

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Nothing to know."""
        return batch

    def token_logps(self, _batch: PackedBatch) -> None:
        """Nothing."""
        return


@dataclass(frozen=True)
class LiveReference:
    """`reference.mode=live`: the engine computes beside the policy."""

    engine: ReferenceEngine

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Nothing is known before the model has scored."""
        return batch

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Score the batch; collective under ZeRO-3."""
        return self.engine.token_logps(batch)


@dataclass(frozen=True)
class AdapterReference:
    """`reference.mode=adapter`: the policy with its adapter off; no second model."""

    policy: PolicyEngine

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Nothing is known before the model has scored."""
        return batch

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Score the batch; collective under ZeRO-3."""
        return self.policy.base_token_logps(batch)


@dataclass(frozen=True)
class StoredReference:
    """`reference.mode=cached`: rows of the store, looked up by content."""

    store: LogpStore

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Look the batch's rows up; a dummy has none and gets zeros."""
        if not len(batch.keys):
            return replace(batch, reference_logps=torch.zeros(len(batch.targets)))
        values = np.concatenate(self.store.read(batch.keys))
        return replace(batch, reference_logps=torch.from_numpy(values))

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """What was looked up."""
        assert batch.reference_logps is not None, "the batch did not go through attach"
        return batch.reference_logps
