"""Find the newest complete checkpoint of a run, and load it on any number of ranks."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.checkpoint_folders import STATE, checkpoint_folders
from dpo_dist.distributed.checkpoint_manifest import Entries, damaged_checkpoint, find_faults, read_parts
from dpo_dist.distributed.random_states import load_random_states
from dpo_dist.distributed.slices import Sharded
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError
from dpo_dist.small_files import read_small

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


def written_entries(folder: Path) -> Entries:
    """Return the entries of an unfinished checkpoint that all ranks have written; none of another one."""
    try:
        return read_parts(folder, read_state(folder)["world_size"])
    except (OSError, ValueError, RecursionError):
        return {}


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
