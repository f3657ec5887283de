"""Checkpoints that exist whole or not at all (law L4).

All ranks write a checkpoint under a temporary name; a manifest lists its files with sizes and digests; then
it is renamed, `latest` follows, and only after that older ones are deleted. Nothing is loaded that no
manifest vouches for. Training continues while the written files are flushed to disk in the background.
"""

import io
import json
import logging
import random
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dpo_dist.atomic import commit_folder, is_temporary, temporary_name, write_text
from dpo_dist.config.schema import ParallelismConfig
from dpo_dist.distributed.checkpoint_manifest import (
    Entries,
    describe_files,
    find_faults,
    has_all_files,
    write_manifest,
)
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError

log = logging.getLogger(__name__)

_STATE = "state.json"
_LATEST = "latest"
_NAME = re.compile(r"step-(\d+)")


class Sharded(Protocol):
    """Weights that training changes, saved by shards: the policy, and a reference that follows it."""

    def save_shards(self, folder: str) -> list[Path]:
        """Write this rank's shards below `folder` and return the files that this rank wrote; collective.

        Raises:
            OSError: they cannot be written.
        """
        ...

    def load_shards(self, folder: str) -> None:
        """Read what `save_shards` wrote on the same number of ranks; collective."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        folder: where its files are.
        state: the loop's state in it.
        damaged: names of newer checkpoints that are not whole.
    """

    folder: Path
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is written, and being flushed to disk in the background."""

    temporary: Path
    folder: Path
    entries: "Future[Entries]"


class CheckpointSaver:
    """Save the checkpoints of one run below `root` and keep the last `keep_last` whole ones, at least one.

    `damaged` names checkpoints that are known not to be whole: they do not count, and are deleted once a
    whole one has been committed.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        parts: Sequence[Sharded],
        world: World,
        damaged: Iterable[str] = (),
    ):
        self._root, self._keep_last = root, max(1, keep_last)
        self._parts, self._world = parts, world
        self._damaged = set(damaged)
        self._disk = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write `root/step-NNNNNN`; it exists once `commit` has returned, or the next `save`. Collective.

        Raises:
            CheckpointError: it cannot be written, or the one before; what is committed is untouched.
        """
        self.commit()
        world, folder = self._world, self._root / f"step-{step:06d}"
        temporary = Path(world.on_main(lambda: _make(temporary_name(folder))))
        written = world.together(lambda: _write(temporary, self._parts, state, world))
        entries = self._disk.submit(_described, written, temporary)
        self._pending = _Pending(temporary, folder, entries)

    @property
    def is_ready(self) -> bool:
        """Whether this rank's files of a pending checkpoint are on disk; not collective."""
        return self._pending is not None and self._pending.entries.done()

    def commit(self) -> None:
        """Wait for the pending checkpoint, if there is one, and make it the latest; collective.

        Raises:
            CheckpointError: the disk did not take it; what was committed before is untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        mine = self._world.together(pending.entries.result)
        entries = {name: entry for part in self._world.gather(mine) for name, entry in part.items()}
        self._world.on_main(lambda: _commit(pending.temporary, pending.folder, entries))
        self._damaged.discard(pending.folder.name)
        self._world.on_main(lambda: _delete_old(pending.folder, self._keep_last, self._damaged))


def latest_checkpoint(root: Path, world: World) -> Checkpoint | None:
    """Return the newest checkpoint whose files are those of its manifest; None if there is none. Collective.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    folders = world.on_main(lambda: _committed(root))
    damaged: list[str] = []
    for folder in folders:
        damage = [
            fault for faults in world.gather(find_faults(folder, world.rank, world.size)) for fault in faults
        ]
        if not damage:
            return Checkpoint(folder, world.on_main(partial(_read_state, folder)), tuple(damaged))
        log.warning("checkpoint %s is damaged and not used: %s", folder, "; ".join(damage[:5]))
        damaged.append(folder.name)
    if folders:
        raise CheckpointError(
            "no checkpoint of this run is whole",
            where=str(root),
            got=f"{', '.join(damaged)}; {damage[0]}",
            remedy="restore the folder, or delete it to start afresh",
        )
    return None


def check_same_processes(checkpoint: Checkpoint, parallelism: ParallelismConfig, world: World) -> None:
    """Accept a checkpoint that as many processes wrote, with the same sharding and the same optimizer.

    Raises:
        CheckpointError: its shards or its optimizer states are others.
    """
    saved_ranks = checkpoint.state["world_size"]
    if saved_ranks != world.size:
        raise CheckpointError(
            "the checkpoint was written by another number of processes",
            where=str(checkpoint.folder),
            got=f"{world.size} processes",
            expected=f"{saved_ranks}",
            remedy=f"launch {saved_ranks} processes, or start afresh with another run.dir",
        )
    for key, value in saved_parallelism(parallelism).items():
        saved = checkpoint.state.get(key, value)
        if saved != value:
            raise CheckpointError(
                f"the checkpoint was written with another {key}",
                where=str(checkpoint.folder),
                got=f"{key}={value}",
                expected=f"{key}={saved}",
                remedy=f"set {key}={saved}, or start afresh with another run.dir",
            )


def saved_parallelism(parallelism: ParallelismConfig) -> dict[str, str]:
    """Return the options that shards and optimizer states depend on, as a checkpoint's state has them."""
    return {
        "parallelism.kind": parallelism.kind.value,
        "parallelism.offload_optimizer": parallelism.offload_optimizer.value,
    }


def load_checkpoint(checkpoint: Checkpoint, parts: Sequence[Sharded], world: World) -> None:
    """Restore weights, optimizer and random states on the processes that saved them; collective."""
    for part in parts:
        part.load_shards(str(checkpoint.folder))
    # Written by this program and vouched for by the manifest, so unpickling it is safe.
    states = torch.load(checkpoint.folder / _random_file(world), weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if world.device.type == "cuda" and states["cuda"] is not None:  # None: saved without a GPU
        torch.cuda.set_rng_state(states["cuda"])


def _read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / _STATE).read_bytes())
    return state


def drop_checkpoints(root: Path) -> None:
    """Delete every checkpoint below `root`; on one rank."""
    unfinished = [folder for folder in root.glob("step-*") if is_temporary(folder)]
    for folder in [*_committed(root), *unfinished]:
        shutil.rmtree(folder, ignore_errors=True)
    (root / _LATEST).unlink(missing_ok=True)


def _make(folder: Path) -> str:
    """A new folder to write in; what a save that never finished left beside it goes first, to make room."""
    for left_over in folder.parent.glob("step-*"):
        if is_temporary(left_over):
            shutil.rmtree(left_over, ignore_errors=True)
    _guard(lambda: folder.mkdir(parents=True), folder)
    return str(folder)


def _write(folder: Path, parts: Sequence[Sharded], state: dict[str, Any], world: World) -> list[Path]:
    """Write this rank's files and return them."""
    written: list[Path] = []

    def work() -> None:
        for part in parts:
            written.extend(part.save_shards(str(folder)))
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if world.device.type == "cuda" else None,
        }
        content = io.BytesIO()  # so that a full disk is an OSError
        torch.save(states, content)
        written.append(folder / _random_file(world))
        written[-1].write_bytes(content.getvalue())
        if world.is_main:
            written.append(folder / _STATE)
            written[-1].write_text(json.dumps({**state, "world_size": world.size}, indent=1))

    _guard(work, folder)
    return written


def _guard(work: Callable[[], None], folder: Path) -> None:
    try:
        work()
    except OSError as error:
        raise CheckpointError(
            "a checkpoint cannot be written",
            where=str(folder),
            got=str(error),
            remedy="make room; the last committed checkpoint is untouched, the same command resumes from it",
        ) from error


def _random_file(world: World) -> str:
    return f"random_states_{world.rank}.pt"


def _described(files: Sequence[Path], folder: Path) -> Entries:
    entries: Entries = {}
    _guard(lambda: entries.update(describe_files(files, folder)), folder)
    return entries


def _commit(temporary: Path, folder: Path, entries: Entries) -> None:
    def work() -> None:
        write_manifest(temporary, entries)
        commit_folder(temporary, folder)
        write_text(folder.parent / _LATEST, folder.name)

    _guard(work, folder)


def _delete_old(committed: Path, keep_last: int, damaged: set[str]) -> None:
    """Keep `committed` and the newest whole ones beside it; of the others only their sizes are looked at."""
    others = [folder for folder in _committed(committed.parent) if folder != committed]
    whole = [folder for folder in others if folder.name not in damaged and has_all_files(folder)]
    for folder in set(others) - set(whole[: keep_last - 1]):
        shutil.rmtree(folder, ignore_errors=True)


def _committed(root: Path) -> list[Path]:
    """Folders of checkpoints, newest first, whole or not."""
    steps = {
        folder: int(match[1])
        for folder in root.glob("step-*")
        if (match := _NAME.fullmatch(folder.name)) and folder.is_dir()
    }
    return sorted(steps, key=lambda folder: steps[folder], reverse=True)
