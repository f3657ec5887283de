"""Checkpoints that exist whole or not at all (law L4).

All ranks write a checkpoint under a temporary name; a manifest lists its files with sizes and digests; then
it is renamed, `latest` follows, and only after that the oldest go. Nothing is loaded that no manifest vouches
for. Training goes on while the disk takes the written files: only what the next step would change is waited
for.
"""

import io
import json
import logging
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dpo_dist.atomic import commit_folder, is_temporary, sync, temporary_name, write_text
from dpo_dist.digests import content_digest
from dpo_dist.distributed.runtime import World
from dpo_dist.errors import CheckpointError

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.json"

Digests = dict[str, dict[str, Any]]


class Sharded(Protocol):
    """What a checkpoint holds of a run's weights: the policy, and what else changes while it trains."""

    def save_shards(self, folder: str) -> None:
        """Write this rank's part; collective.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def load_shards(self, folder: str) -> None:
        """Read what `save_shards` wrote on the same number of ranks; collective."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and the loop's state in it."""

    folder: Path
    state: dict[str, Any]


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is written, and on its way to the disk in the background."""

    temporary: Path
    folder: Path
    digests: "Future[Digests]"


class CheckpointSaver:
    """Saves the checkpoints of one run below `root` and keeps the last `keep_last` of them."""

    def __init__(self, root: Path, keep_last: int, parts: Sequence[Sharded], world: World):
        self._root, self._keep_last = root, keep_last
        self._parts, self._world = parts, world
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
        world.together(lambda: _write(temporary, self._parts, state, world))
        digests = self._disk.submit(_sync_share, temporary, world)
        self._pending = _Pending(temporary, folder, digests)

    @property
    def is_ready(self) -> bool:
        """Whether this rank's files of a pending checkpoint are on disk; not collective."""
        return self._pending is not None and self._pending.digests.done()

    def commit(self) -> None:
        """Wait for the pending checkpoint, if there is one, and make it the latest; collective.

        Raises:
            CheckpointError: the disk did not take it; what was committed before is untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        digests = self._world.together(pending.digests.result)
        listed = {name: entry for part in self._world.gather(digests) for name, entry in part.items()}
        self._world.on_main(lambda: _commit(pending.temporary, pending.folder, listed, self._keep_last))


def latest_checkpoint(root: Path, world: World) -> Checkpoint | None:
    """The newest committed checkpoint whose files are what its manifest says; collective.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    folders = world.on_main(lambda: _committed(root))
    for folder in folders:
        damage = [fault for faults in world.gather(_verify_share(folder, world)) for fault in faults]
        if not damage:
            return Checkpoint(folder, json.loads((folder / _STATE).read_text()))
        log.warning("checkpoint %s is damaged and passed over: %s", folder, "; ".join(damage[:5]))
    if folders:
        raise CheckpointError(
            "no checkpoint of this run is whole",
            where=str(root),
            got=", ".join(folder.name for folder in folders),
            remedy="restore the folder, or set run.resume=never and another run.dir to start afresh",
        )
    return None


def load_checkpoint(checkpoint: Checkpoint, parts: Sequence[Sharded], world: World) -> None:
    """Restore weights, optimizer and random states on the number of ranks that saved them; collective.

    Raises:
        CheckpointError: the number of ranks differs.
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
    for part in parts:
        part.load_shards(str(checkpoint.folder))
    # Written by this program and vouched for by the manifest, so unpickling it is safe.
    states = torch.load(checkpoint.folder / _random_file(world), weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])


def _make(folder: Path) -> str:
    """A new folder to write in; what a save that never finished left beside it goes first, to make room."""
    for left_over in folder.parent.glob("step-*"):
        if is_temporary(left_over):
            shutil.rmtree(left_over, ignore_errors=True)
    _guard(lambda: folder.mkdir(parents=True), folder)
    return str(folder)


def _write(folder: Path, parts: Sequence[Sharded], state: dict[str, Any], world: World) -> None:
    def work() -> None:
        for part in parts:
            part.save_shards(str(folder))
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if world.device.type == "cuda" else None,
        }
        content = io.BytesIO()  # so that a full disk is an OSError
        torch.save(states, content)
        (folder / _random_file(world)).write_bytes(content.getvalue())
        if world.is_main:
            (folder / _STATE).write_text(json.dumps({**state, "world_size": world.size}, indent=1))

    _guard(work, folder)


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


def _share(folder: Path, world: World) -> list[Path]:
    """The files that this rank reads to digest them, so that all ranks share the work."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _MANIFEST)
    return files[world.rank :: world.size]


def _sync_share(folder: Path, world: World) -> Digests:
    """Flush this rank's share of the files to disk and digest them."""
    digests: Digests = {}

    def work() -> None:
        for file in _share(folder, world):
            sync(file)
            entry = {"bytes": file.stat().st_size, "digest": content_digest([file])}
            digests[str(file.relative_to(folder))] = entry

    _guard(work, folder)
    return digests


def _commit(temporary: Path, folder: Path, listed: Digests, keep_last: int) -> None:
    def work() -> None:
        (temporary / _MANIFEST).write_text(json.dumps({"files": listed}, indent=1))
        commit_folder(temporary, folder)
        write_text(folder.parent / "latest", folder.name)

    _guard(work, folder)
    for old in _committed(folder.parent)[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)


def _committed(root: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted(
        (f for f in root.glob("step-*") if not is_temporary(f) and (f / _MANIFEST).is_file()), reverse=True
    )


def _verify_share(folder: Path, world: World) -> list[str]:
    """What this rank's share of the manifest's files has wrong."""
    try:
        listed = json.loads((folder / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{_MANIFEST}: {error}"]
    faults = []
    for name in sorted(listed)[world.rank :: world.size]:
        file = folder / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != listed[name]["bytes"] or content_digest([file]) != listed[name]["digest"]:
            faults.append(f"{name} differs from its digest")
    return faults
