"""Load the weights of a checkpoint into a model on any number of processes, without optimizer states."""

from collections.abc import Mapping
from pathlib import Path

import deepspeed
import torch
from torch import nn

from dpo_dist.distributed.engine import SHARDS
from dpo_dist.distributed.slice_files import SavedSlices
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError


@torch.no_grad()
def load_checkpoint_weights(model: nn.Module, folder: Path, world: World) -> None:
    """Replace the trained weights of `model` by the master weights of a checkpoint; collective.

    Rank 0 reads and sends one weight at a time.

    Args:
        model: of the run that wrote the checkpoint, sharded by ZeRO-3 or not; the weights that it trains
            require a gradient.
        folder: the checkpoint, whose files have been checked.
        world: of this start.

    Raises:
        CheckpointError: the checkpoint is not of this model.
    """
    trained = {
        name.removeprefix("causal_lm."): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }

    def find() -> SavedSlices:
        found = read_weights(folder)
        check_shapes(trained, found.shapes, folder)
        return found

    saved = world.on_main(find)
    for name, weight in trained.items():
        if hasattr(weight, "ds_id"):
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                if world.is_main:
                    weight.copy_(saved.whole(name))
        else:
            weight.copy_(world.on_main(lambda name=name: saved.whole(name)))  # type: ignore[misc]


def read_weights(folder: Path) -> SavedSlices:
    """Return the slices of the trained weights in a checkpoint, by transformers name.

    Args:
        folder: the checkpoint, whose files have been checked.

    Raises:
        CheckpointError: they cannot be read.
    """
    return SavedSlices.find(folder, SHARDS)


def check_shapes(
    trained: Mapping[str, nn.Parameter], saved: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Check that both have the same names and shapes.

    Raises:
        CheckpointError: they differ.
    """
    wanted = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in trained.items()}
    missing = [name for name, shape in wanted.items() if saved.get(name) != shape]
    if missing:
        raise CheckpointError(
            "the weights of the checkpoint are not those that this configuration trains",
            where=str(folder),
            got=f"{len(missing)} of {len(wanted)} weights are missing or have another shape: {missing[0]}",
            remedy="set model.path and model.adapter as in the config.yaml of its run",
        )
