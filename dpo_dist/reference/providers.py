"""Sources of a micro-batch's reference log-probs: the store, a live engine, the policy's base, or none."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
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
        """Attach log-probs that need no forward pass, on the host; thread-safe. By default there are none."""
        return batch

    def mapped_files(self) -> Iterable[Path]:
        """Return the files whose values `attach` reads from memory maps. By default there are none."""
        return ()

    def token_logps(self, batch: PackedBatch) -> Tensor | None:
        """Return float32 [targets] on the device of a batch that `attach` returned; None in mode `none`.

        Collective where a model computes them.
        """
        ...


class NoReference(ReferenceProvider):
    """`reference.mode=none`."""

    def token_logps(self, _batch: PackedBatch) -> None:
        """Return None."""


@dataclass(frozen=True)
class LiveReference(ReferenceProvider):
    """`reference.mode=live`: an engine beside the policy."""

    engine: ReferenceEngine

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Score the batch with the reference."""
        return self.engine.token_logps(batch)


@dataclass(frozen=True)
class AdapterReference(ReferenceProvider):
    """`reference.mode=adapter`: the policy with its adapter switched off."""

    policy: PolicyEngine

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Score the batch with the policy's base."""
        return self.policy.base_token_logps(batch)


@dataclass(frozen=True)
class StoredReference(ReferenceProvider):
    """`reference.mode=cached`: entries of the store, looked up by content."""

    store: LogpStore

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Look up the batch's entries, which are of whole responses; a dummy batch gets zeros."""
        if not len(batch.keys):
            return replace(batch, reference_logps=torch.zeros(len(batch.targets)))
        values = np.concatenate(self.store.read(batch.keys))
        scored = values if batch.mask is None else values[batch.mask]
        return replace(batch, reference_logps=torch.from_numpy(scored))

    def mapped_files(self) -> Iterable[Path]:
        """Return the shards of the store."""
        return [self.store.root / name for name in self.store.shards]

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Return the log-probs that `attach` looked up."""
        assert batch.reference_logps is not None, "the batch did not go through attach"
        return batch.reference_logps
