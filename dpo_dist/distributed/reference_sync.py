"""Update the reference model from the policy (TR-DPO, arXiv:2404.09656), by shard and without a gather.

The reference is sharded as in ZeRO-3, whatever the policy is: each rank has a slice of every weight, all of
equal length, the last one padded. A ZeRO-3 policy has the same slice on this rank; any other policy has the
whole weight.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from dpo_dist.config.losses import SyncReferenceConfig
from dpo_dist.distributed.checkpoint.saver import SavedSlices
from dpo_dist.distributed.checkpoint.slices import WEIGHT, ModelSlices, Slice, weight_slices
from dpo_dist.distributed.deepspeed_internals import release_gathered, shard_of
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import FrozenEngine, PolicyEngine
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.library_internals import whole_shape

_CHUNK_ELEMENTS = 2**24
_SHARDS = "reference"


class ReferenceSync:
    """Move the reference towards the policy, and save the moved reference in checkpoints."""

    def __init__(
        self, reference: FrozenEngine, policy: PolicyEngine, config: SyncReferenceConfig, world: World
    ):
        assert config.every is not None, "a reference without loss.sync_reference.every is never updated"
        self._every = config.every
        self._mixup = config.mixup
        self._world = world
        self._reference = dict(reference.causal_lm.named_parameters())
        self._policy = dict(policy.causal_lm.named_parameters())
        first, second = (
            {(name, whole_shape(weight)) for name, weight in weights.items()}
            for weights in (self._reference, self._policy)
        )
        differing = sorted({name for name, _ in first ^ second})
        if differing:
            raise ConfigError(
                "a reference that is updated from the policy needs the policy's weight names and shapes",
                where="loss.sync_reference, reference.path",
                got=f"{len(differing)} weights of other names or shapes: {', '.join(differing[:5])}",
                remedy="set reference.path to a model of the policy's shapes, or remove loss.sync_reference",
            )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Mix the weights if `step`, the number of completed steps, is a multiple of `every`.

        The mixed weights are those of the forward, for a policy in bf16 not its float32 master weights, so
        that `mixup=1` makes both models equal. The arithmetic is float32.
        """
        if step % self._every:
            return
        for piece in self._slices():
            weight = self._policy[piece.name]
            slice_ = piece.parts[WEIGHT]
            shard = shard_of(weight)
            of_policy = weight.data.view(-1)[piece.start :] if shard is None else shard.data
            for start in range(0, len(slice_), _CHUNK_ELEMENTS):
                end = min(start + _CHUNK_ELEMENTS, len(slice_))
                old, new = slice_[start:end], of_policy[start:end]
                old.copy_(old.float().lerp(new.to(old.device, torch.float32), self._mixup))
        release_gathered(self._reference.values())

    def shards(self) -> ModelSlices:
        """Return this rank's slices of the reference; not collective."""
        return ModelSlices(_SHARDS, list(self._slices()) if self._world.writes_shards else [])

    @torch.no_grad()
    def load_shards(self, folder: Path) -> None:
        """Load the shards from a checkpoint that any number of ranks wrote; collective."""
        saved = self._world.on_main(lambda: SavedSlices.find(folder, _SHARDS))
        self._world.together(lambda: saved.load_into(self._slices()))
        release_gathered(self._reference.values())

    def _slices(self) -> Iterator[Slice]:
        return weight_slices(self._reference)
