"""Find the newest complete checkpoint of a run, and load it on any number of ranks."""

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn

from dpo_dist.config.run_folder import STATE, checkpoint_folders
from dpo_dist.distributed.manifest import damaged_checkpoint, find_faults
from dpo_dist.distributed.slices import SavedSlices, Sharded
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import SHARDS
from dpo_dist.foundation.errors import CheckpointError, first_line
from dpo_dist.foundation.files import read_small


def random_states(device: torch.device) -> str:
    """Return the states of this rank as JSON."""
    numpy_name, numpy_key, *numpy_rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": [numpy_name, np.asarray(numpy_key).tolist(), *numpy_rest],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if device.type == "cuda" else None,
    }
    return json.dumps(states)


def load_random_states(folder: Path, rank: int, saved_ranks: int, device: torch.device) -> None:
    """Restore the states of this rank.

    A rank that did not exist when they were saved gets a state of its own, which depends on the saved ones.

    Args:
        folder: the checkpoint.
        rank: of this process.
        saved_ranks: number of ranks that saved their states.
        device: of this process.

    Raises:
        CheckpointError: the file cannot be read.
    """
    file = folder / random_states_name(rank % saved_ranks)
    try:
        states = json.loads(read_small(file))
        if rank >= saved_ranks:
            _seed(f"{rank} {states['torch']}")
            return
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(states["numpy"]))
        torch.set_rng_state(_tensor(states["torch"]))
        if device.type == "cuda" and states["cuda"] is not None:  # None: saved without a GPU
            torch.cuda.set_rng_state(_tensor(states["cuda"]))
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            "the random states of the checkpoint cannot be read",
            where=str(file),
            got=first_line(error),
            remedy="restore the file, or resume from another checkpoint",
        ) from error


def _seed(text: str) -> None:
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _tensor(state: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)


def random_states_name(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint."""
    return f"random_states_{rank}.json"


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        folder: the folder of its files.
        state: the loop's state.
        damaged: names of newer checkpoints that are damaged.
    """

    folder: Path
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()


def latest_checkpoint(root: Path, world: World) -> Checkpoint | None:
    """Return the newest checkpoint whose files match its manifest; None without checkpoints. Collective.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    folders = world.on_main(lambda: checkpoint_folders(root))
    damaged: list[str] = []
    for folder in folders:
        damage = _damage(folder, world)
        if not damage:
            return Checkpoint(folder, _state(folder, world), tuple(damaged))
        log.warning("checkpoint %s is damaged and not used: %s", folder, "; ".join(damage[:5]))
        damaged.append(folder.name)
    if folders:
        raise CheckpointError(
            "every checkpoint of this run is damaged",
            where=str(root),
            got=f"{', '.join(damaged)}; {damage[0]}",
            remedy="restore the folder, or set another run.dir to start from the beginning",
        )
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state in a checkpoint, whose files are not checked; not collective.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    try:
        state: Any = json.loads(read_small(folder / STATE))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(state, dict) or not isinstance(ranks := state.get("world_size"), int) or ranks < 1:
        raise ValueError("it has no number of processes")
    return state


def open_checkpoint(folder: Path, world: World) -> Checkpoint:
    """Return the checkpoint in a folder; collective.

    Raises:
        CheckpointError: its files do not match its manifest.
    """
    if damage := _damage(folder, world):
        raise damaged_checkpoint(folder, damage)
    return Checkpoint(folder, _state(folder, world))


def _damage(folder: Path, world: World) -> list[str]:
    """Return the faults of all files of a checkpoint, divided among the ranks; collective."""
    faults = world.gather(find_faults(folder, world.rank, world.size))
    return [fault for of_rank in faults for fault in of_rank]


def _state(folder: Path, world: World) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        try:
            return read_state(folder)
        except (OSError, ValueError) as error:
            raise damaged_checkpoint(folder, [f"{STATE}: {error}"]) from error

    return world.on_main(read)


def load_checkpoint(checkpoint: Checkpoint, parts: Sequence[Sharded], world: World) -> None:
    """Restore weights, optimizer and random states on any number of ranks; collective.

    Raises:
        CheckpointError: a file cannot be read, or is not of this model.
    """
    for part in parts:
        part.load_shards(checkpoint.folder)
    saved_ranks = checkpoint.state["world_size"]
    # Ranks that compute the same micro-batches draw the same numbers: a user's loss may be random.
    drawn_as = world.replica * (world.size // world.replicas)
    world.together(lambda: load_random_states(checkpoint.folder, drawn_as, saved_ranks, world.device))


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
