"""A teacher's distributions for a micro-batch: from the store, or from the teacher beside the policy.

The tokens that are drawn depend on the response and its place in it alone, so that they are the same
on any rank, in any batch and at any time.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.distributed.zero import Engine, PolicyEngine
from dpo_dist.objective.distillation import SparseRows, TeacherInputs, WholeDistributions
from dpo_dist.reference.store import LogpStore


@dataclass(frozen=True)
class Teacher:
    """Gives batches what the teacher wants; of `engine`, `policy` and `store` one is set.

    `policy`: the trained model itself, with `without_adapter` before it was trained.
    """

    kept: SparseRows | WholeDistributions
    engine: Engine | None = None
    store: LogpStore | None = None
    policy: PolicyEngine | None = None
    without_adapter: bool = False

    def ready(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch on the host with stored rows, or with what an engine needs. Thread-safe.

        The store has rows of chosen responses only, which the loss counts: others, and a dummy, get zeros.
        """
        if self.store is None:
            if "teacher" not in batch.views:
                return with_uniforms(batch, self.kept)
            asked = with_uniforms(batch.view("teacher"), self.kept)
            return replace(batch, views={**batch.views, "teacher": asked})
        assert isinstance(self.kept, SparseRows)
        keys = batch.keys_for("teacher")
        lengths = batch.response_lengths
        chosen = _chosen(batch) if len(batch.keys) else []
        parts = [np.zeros((tokens, self.kept.width), dtype=np.float32) for tokens in lengths]
        for response, rows in zip(chosen, self.store.read(keys[chosen]), strict=True):
            fault = self.kept.fault(rows)
            if len(rows) != lengths[response]:
                fault = f"{len(rows)} tokens in place of {lengths[response]}"
            if fault:
                raise self.store.wrong_entry(keys[response].tolist(), fault)
            parts[response] = rows
        every = np.concatenate(parts)
        counted = every if batch.mask is None else every[batch.mask]
        return replace(batch, teacher=TeacherInputs(self.kept, rows=torch.from_numpy(counted)))

    def answer(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch of `ready` on the device with its rows; collective if an engine computes them."""
        if self.store is not None:
            return batch
        asked = batch.view("teacher")
        if self.policy is not None:
            rows = self.policy.scored(asked, ("as_teacher",), without_adapter=self.without_adapter)
        else:
            assert self.engine is not None
            rows = self.engine.token_logps(asked, ("as_teacher",))
        answered = TeacherInputs(self.kept, rows=rows.T)
        if isinstance(self.kept, WholeDistributions):
            model = self.policy or self.engine
            assert model is not None
            answered = answered._replace(logits=model.logits_of_states(without_adapter=self.without_adapter))
        return replace(batch, teacher=answered)


def with_uniforms(batch: PackedBatch, kept: SparseRows | WholeDistributions) -> PackedBatch:
    """Return a batch on the host with the numbers that draw its teacher's tokens."""
    uniforms = np.zeros((len(batch.targets), kept.drawn), dtype=np.float32)
    if len(batch.keys):
        parts = []
        for key, tokens in zip(batch.keys.tolist(), batch.response_lengths, strict=True):
            generator = np.random.default_rng([0, *key])
            parts.append(generator.random((tokens, kept.drawn), dtype=np.float32))
        every = np.concatenate(parts)
        uniforms = every if batch.mask is None else every[batch.mask]
    return replace(batch, teacher=TeacherInputs(kept, uniforms=torch.from_numpy(uniforms)))


def _chosen(batch: PackedBatch) -> list[int]:
    """Return the responses that are the best of their examples."""
    if batch.ranking is None:
        return [*range(0, len(batch.response_tokens), 2)]
    chosen: list[int] = batch.ranking[:, 0].tolist()
    return chosen
