"""Load the weights of a checkpoint into a model on any number of processes, without optimizer states."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

from dpo_dist.distributed.engine import SHARDS
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError, first_line


@torch.no_grad()
def load_checkpoint_weights(model: nn.Module, folder: Path, world: World) -> None:
    """Replace the trained weights of `model` by the master weights of a checkpoint; collective.

    Rank 0 reads the shards, which are mapped and not loaded whole under ZeRO-3, and sends one weight at a
    time.

    Args:
        model: of the run that wrote the checkpoint, sharded by ZeRO-3 or not; the weights that it trains
            require a gradient.
        folder: the checkpoint, whose files have been checked.
        world: of this start.

    Raises:
        CheckpointError: the checkpoint is not of this model.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    saved: dict[str, Any] = {}

    def read() -> None:
        saved.update(read_weights(folder))
        _check_shapes(trained, saved, folder)

    world.on_main(read)
    for name, weight in trained.items():
        if hasattr(weight, "ds_id"):
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                if world.is_main:
                    weight.copy_(saved[name].contiguous())
        else:
            weight.copy_(world.on_main(lambda name=name: saved[name].contiguous()))  # type: ignore[misc]


def read_weights(folder: Path) -> dict[str, Any]:
    """Return the trained float32 weights of a checkpoint by name; their method `contiguous` gives the tensor.

    Args:
        folder: the checkpoint, whose files have been checked.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=SHARDS, exclude_frozen_parameters=True, lazy_mode=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            "the weights of the checkpoint cannot be read",
            where=str(folder),
            got=first_line(error),
            remedy="restore its files, or name another checkpoint",
        ) from error
    return found


def _check_shapes(trained: Mapping[str, nn.Parameter], saved: Mapping[str, Any], folder: Path) -> None:
    """Check that both have the same names and shapes.

    Raises:
        CheckpointError: they differ.
    """
    wanted = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in trained.items()}
    missing = [
        name for name, shape in wanted.items() if name not in saved or tuple(saved[name].shape) != shape
    ]
    if missing:
        raise CheckpointError(
            "the weights of the checkpoint are not those that this configuration trains",
            where=str(folder),
            got=f"{len(missing)} of {len(wanted)} weights are missing or have another shape: {missing[0]}",
            remedy="set model.path and model.adapter as in the config.yaml of its run",
        )
