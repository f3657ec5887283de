"""A reference that follows the policy (TR-DPO, arXiv:2404.09656), shard by shard and without a gather.

The reference is sharded as in ZeRO-3 whatever the policy is: of every weight a rank holds a slice of equal
length, the last one padded. A policy sharded alike has the same slice at hand, any other the whole weight.
"""

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_dist.config.loss_kinds import SyncReferenceConfig
from dpo_dist.distributed.engine import FrozenEngine, PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.errors import ConfigError

_CHUNK_ELEMENTS = 2**24


class ReferenceSync:
    """Moves the reference towards the policy, and keeps where it has got to in checkpoints.

    Raises:
        ConfigError: their weights are not of the same names and shapes.
    """

    def __init__(
        self, reference: FrozenEngine, policy: PolicyEngine, config: SyncReferenceConfig, world: World
    ):
        assert config.every is not None, "loss.sync_reference.every says whether there is a sync"
        self._every, self._mixup, self._world = config.every, config.mixup, world
        self._reference = dict(reference.causal_lm.named_parameters())
        self._policy = dict(policy.causal_lm.named_parameters())
        _check_same_layout(self._reference, self._policy)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Mix where `step`, the number of steps done, is a multiple of `every`.

        Weights are mixed as the model computes with them: of a policy in bf16 not its float32 master weights,
        so that `mixup=1` makes the two models equal. The arithmetic is float32.
        """
        if step % self._every:
            return
        for name, reference in self._reference.items():
            mine = _owned(reference, reference, self._world.rank)
            policys = _owned(self._policy[name], reference, self._world.rank)
            for start in range(0, len(mine), _CHUNK_ELEMENTS):
                old, new = (part[start : start + _CHUNK_ELEMENTS] for part in (mine, policys))
                old.copy_(old.float().lerp(new.to(old.device, torch.float32), self._mixup))
            _forget_whole(reference)

    def save_shards(self, folder: str) -> list[Path]:
        """Write the reference as it is now, every rank its own shards; returns this rank's file.

        Raises:
            OSError: they cannot be written.
        """
        try:
            save_file(
                {name: weight.ds_tensor.data for name, weight in self._reference.items()}, self._file(folder)
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error
        return [self._file(folder)]

    @torch.no_grad()
    def load_shards(self, folder: str) -> None:
        """Read what `save_shards` wrote on the same number of ranks."""
        saved = load_file(self._file(folder))
        for name, weight in self._reference.items():
            weight.ds_tensor.copy_(saved[name])
            _forget_whole(weight)

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"reference_{self._world.rank}.safetensors"


def _owned(weight: Any, reference: Any, rank: int) -> Tensor:
    """The elements of `weight` that this rank's shard of `reference`, a weight of its shape, covers: flat,
    in place, without padding.
    """
    size = reference.ds_tensor.ds_numel
    start = rank * size
    count = max(0, min(size, reference.ds_numel - start))
    if hasattr(weight, "ds_tensor"):
        shard: Tensor = weight.ds_tensor.data
        return shard[:count]
    whole: Tensor = weight.data
    return whole.view(-1)[start : start + count]


def _forget_whole(weight: Any) -> None:
    """Have a small weight that stays gathered between forwards gathered anew."""
    if weight.ds_status is ZeroParamStatus.AVAILABLE:
        weight.partition()


def _check_same_layout(reference: dict[str, nn.Parameter], policy: dict[str, nn.Parameter]) -> None:
    shapes = [
        {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}
        for weights in (reference, policy)
    ]
    differing = sorted(dict(shapes[0].items() ^ shapes[1].items()))
    if differing:
        raise ConfigError(
            "a reference that follows the policy must have the policy's weights",
            where="loss.sync_reference, reference.path",
            got=f"{len(differing)} weights of other names or shapes: {', '.join(differing[:5])}",
            remedy="name a reference of the policy's architecture, or leave loss.sync_reference out",
        )
