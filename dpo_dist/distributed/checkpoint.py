"""Save checkpoints that are complete or absent (law L4), and load them on any number of ranks.

All ranks write a checkpoint under a temporary name; a manifest lists its files with sizes and digests. Then
the folder is renamed, `latest` and `best` are updated, and after that older checkpoints are deleted. Only
files that match a manifest are loaded. Training continues while copies of the weights are written in the
background.
"""

import contextlib
import hashlib
import json
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn

from dpo_dist.config.run_folder import (
    BEST,
    STATE,
    best_checkpoints,
    checkpoint_folders,
    checkpoint_name,
    step_of,
)
from dpo_dist.distributed.manifest import (
    Entries,
    damaged_checkpoint,
    find_faults,
    has_all_files,
    write_file,
    write_manifest,
)
from dpo_dist.distributed.slices import HostCopy, ModelSlices, SavedSlices, Sharded, write_slices
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import SHARDS
from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import (
    commit_folder,
    final_name,
    is_temporary,
    recover_folder,
    temporary_name,
    write_text,
)
from dpo_dist.foundation.process import note_progress
from dpo_dist.foundation.text import size

log = logging.getLogger(__name__)

_LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder, the loop's state, and names of newer ones that are damaged."""

    folder: Path
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()


def latest_checkpoint(root: Path, world: World) -> Checkpoint | None:
    """Return the newest checkpoint whose files match its manifest; None without checkpoints. Collective."""
    folders = world.on_main(lambda: checkpoint_folders(root))
    damaged: list[str] = []
    for folder in folders:
        faults = _find_faults(folder, world)
        if not faults:
            return Checkpoint(folder, world.on_main(lambda: read_state(folder)), tuple(damaged))  # noqa: B023
        log.warning("checkpoint %s is damaged and not used: %s", folder, "; ".join(faults[:5]))
        damaged.append(folder.name)
    if folders:
        raise CheckpointError(
            "every checkpoint of this run is damaged",
            where=str(root),
            got=f"{', '.join(damaged)}; {faults[0]}",
            remedy="restore the folder, or set another run.dir to start from the beginning",
        )
    return None


def open_checkpoint(folder: Path, world: World) -> Checkpoint:
    """Return the checkpoint in a folder; collective."""
    if faults := _find_faults(folder, world):
        raise damaged_checkpoint(folder, faults)
    return Checkpoint(folder, world.on_main(lambda: read_state(folder)))


def _find_faults(folder: Path, world: World) -> list[str]:
    """Return the faults of all files of a checkpoint, divided among the ranks; collective."""
    return [fault for part in world.gather(find_faults(folder, world.rank, world.size)) for fault in part]


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state in a checkpoint, whose files are not checked; not collective."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    return state


def load_checkpoint(checkpoint: Checkpoint, parts: Sequence[Sharded], world: World) -> None:
    """Restore weights, optimizer and random states on any number of ranks; collective."""
    for part in parts:
        part.load_shards(checkpoint.folder)
    # Ranks that compute the same micro-batches draw the same numbers: a user's loss may be random.
    drawn_as = world.replica * (world.size // world.replicas)
    load_random_states(checkpoint.folder, drawn_as, checkpoint.state["world_size"], world.device)


def random_states(device: torch.device) -> str:
    """Return the random states of this rank as JSON."""
    numpy_name, numpy_key, *numpy_rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": [numpy_name, np.asarray(numpy_key).tolist(), *numpy_rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if device.type == "cuda" else None,
    }
    return json.dumps(states)


def load_random_states(folder: Path, rank: int, saved_ranks: int, device: torch.device) -> None:
    """Restore the random states of a rank; one that saved none gets others, by the saved ones."""
    states = json.loads((folder / random_states_name(rank % saved_ranks)).read_bytes())
    if rank >= saved_ranks:
        text = f"{rank} {bytes(states['torch']).hex()}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if device.type == "cuda" and states["cuda"] is not None:  # None: saved without a GPU
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


def random_states_name(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint."""
    return f"random_states_{rank}.json"


def read_weights(folder: Path, trained: Mapping[str, nn.Parameter]) -> SavedSlices:
    """Return the slices of the weights that a run trains, by transformers name, in a checked checkpoint."""
    saved = SavedSlices.find(folder, SHARDS)
    wanted = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in trained.items()}
    missing = [name for name, shape in wanted.items() if saved.shapes.get(name) != shape]
    if missing:
        raise CheckpointError(
            "the weights of the checkpoint are not those that this configuration trains",
            where=str(folder),
            got=f"{len(missing)} of {len(wanted)} weights are missing or have another shape: {missing[0]}",
            remedy="set model.path and model.adapter as in the config.yaml of its run",
        )
    return saved


@torch.no_grad()
def load_checkpoint_weights(model: nn.Module, folder: Path, world: World) -> None:
    """Replace the trained weights of `model`, sharded by ZeRO-3 or not, by a checkpoint's; collective.

    Rank 0 reads and sends one master weight at a time. Trained weights require a gradient.
    """
    trained = {
        name.removeprefix("causal_lm."): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    saved = world.on_main(lambda: read_weights(folder, trained))
    for name, weight in trained.items():
        if hasattr(weight, "ds_id"):
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                if world.is_main:
                    weight.copy_(saved.whole(name))
        else:
            weight.copy_(world.on_main(lambda name=name: saved.whole(name)))  # type: ignore[misc]


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is not committed yet, as one rank writes it.

    Attributes:
        temporary: the folder that is written.
        folder: its final name.
        bytes: of the whole checkpoint.
        entries: of this rank's files, once they are on disk; or the error.
    """

    temporary: Path
    folder: Path
    bytes: int
    entries: Future[Entries] = field(default_factory=Future)

    def write(
        self, models: Sequence[ModelSlices], texts: dict[str, str], rank: int, copy: HostCopy | None = None
    ) -> None:
        """Write slices, which nothing changes meanwhile, and small files of this rank, and set `entries`."""
        try:
            entries: Entries = {}
            with disk_errors(self.temporary, self.bytes):
                for model in models:
                    entries |= write_slices(model, self.temporary, rank, copy)
                for name, text in texts.items():
                    entries[name] = write_file(self.temporary / name, text.encode())
            self.entries.set_result(entries)
        except BaseException as error:  # raised by `entries`, in the main thread
            self.entries.set_exception(error)


class CheckpointSaver:
    """Save the checkpoints of one run below `root` and keep the newest `keep_last`, at least one.

    Args:
        root: folder of the checkpoints; its parent, the run directory, exists.
        keep_last: number of checkpoints to keep.
        parts: the weights.
        world: of this start.
        damaged: names of checkpoints that are not counted, and are deleted after the next commit.
        say: called with a warning on every rank.
        committed: called on rank 0 with the step of each committed checkpoint.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        parts: Sequence[Sharded],
        world: World,
        damaged: Iterable[str] = (),
        *,
        say: Callable[[str], None] = log.warning,
        committed: Callable[[int], None] = lambda _step: None,
    ):
        self._root, self._keep_last = root, max(1, keep_last)
        self._parts, self._world = parts, world
        self._damaged = set(damaged)
        self._copy = HostCopy(world.device)
        self._say, self._has_said = say, False
        self._committed = committed
        self._pending: _Pending | None = None
        self._best: list[str] = []

    def save(self, step: int, state: dict[str, Any], *, is_last: bool = False) -> None:
        """Write `root/step-NNNNNN`, which appears with the next `commit` or `save`; collective.

        Training may continue at once, unless it `is_last`. A former checkpoint is committed first.
        """
        self.commit()
        self._best = [checkpoint_name(one["step"]) for one in state.get("best", [])]
        world, folder = self._world, self._root / checkpoint_name(step)
        models = [part.shards() for part in self._parts]
        texts = {random_states_name(world.rank): random_states(world.device)}
        if world.is_main:
            texts[STATE] = json.dumps({**state, "world_size": world.size}, indent=1)
        needed = sum(world.gather(sum(model.bytes for model in models) + sum(map(len, texts.values()))))
        temporary = Path(world.on_main(lambda: self._create(temporary_name(folder))))
        self._pending = pending = _Pending(temporary, folder, needed)
        if not is_last and self._can_copy(models):
            arguments = self._copy.of(models), texts, world.rank
            threading.Thread(target=pending.write, args=arguments, daemon=True).start()
            return
        pending.write(models, texts, world.rank, self._copy)
        self._copy.close()  # host memory is short, or training ends
        if any(world.gather(pending.entries.exception() is not None)):
            self.commit()  # which raises the error on all ranks

    def _create(self, folder: Path) -> str:
        """Create `folder` and return it; first remove unfinished checkpoints beside it, to make room."""
        with disk_errors(folder):
            remove_unfinished(self._root)
            self._root.mkdir(exist_ok=True)
            folder.mkdir()
        return str(folder)

    def _can_copy(self, models: Sequence[ModelSlices]) -> bool:
        """Return whether all ranks copy their slices; say once if there is no room for it. Collective."""
        has_room = self._copy.has_room(models, self._world)
        if not has_room and not self._has_said:
            self._say(
                "training waits while a checkpoint is written: host memory has no room for a copy of it"
            )
            self._has_said = True
        return has_room

    @property
    def is_written(self) -> bool:
        """Return whether this rank's files of a pending checkpoint are on disk, or failed; not collective.

        When they are on all ranks, the checkpoint can be committed without a wait.
        """
        return self._pending is not None and self._pending.entries.done()

    def commit(self) -> None:
        """Wait for the pending checkpoint, if any, and make it the latest; collective."""
        pending, self._pending, world = self._pending, None, self._world
        if pending is None:
            return
        try:
            mine = world.together(pending.entries.result)
            entries = {name: entry for part in world.gather(mine) for name, entry in part.items()}
            world.on_main(lambda: self._commit(pending, entries))
        except CheckpointError:
            if world.is_main:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise
        self._damaged.discard(pending.folder.name)
        world.on_main(lambda: self._list_best(self._best))
        # Some file systems need minutes to delete files of terabytes.
        world.on_main(lambda: self._delete_old(pending.folder, self._best))

    def _commit(self, pending: _Pending, entries: Entries) -> None:
        with disk_errors(pending.temporary, pending.bytes):
            write_manifest(pending.temporary, entries)
            commit_folder(pending.temporary, pending.folder)
            write_text(self._root / _LATEST, pending.folder.name)
            note_progress(str(pending.folder))
            self._committed(step_of(pending.folder.name) or 0)

    def _list_best(self, best: Sequence[str]) -> None:
        with disk_errors(self._root):
            if best:
                write_text(self._root / BEST, "".join(f"{name}\n" for name in best))
            else:
                (self._root / BEST).unlink(missing_ok=True)

    def _delete_old(self, committed: Path, best: Sequence[str]) -> None:
        """Delete all checkpoints but `committed`, the best and the newest complete ones, checked by size."""
        others = [folder for folder in checkpoint_folders(self._root) if folder != committed]
        complete = [each for each in others if each.name not in self._damaged and has_all_files(each)]
        kept = {*complete[: self._keep_last - 1], *(folder for folder in complete if folder.name in best)}
        for folder in set(others) - kept:
            shutil.rmtree(folder, ignore_errors=True)

    def resume(self, folder: Path, best_steps: Iterable[int]) -> None:
        """Complete what a kill may have cut after the commit of the checkpoint that is resumed; collective.

        Args:
            folder: of the checkpoint.
            best_steps: steps of the best checkpoints, the best first.
        """
        best = [checkpoint_name(step) for step in best_steps]

        def complete() -> None:
            with disk_errors(folder):
                write_text(self._root / _LATEST, folder.name)
            self._list_best(best)
            if not self._damaged:  # deleted after the next commit, as are the others then
                self._delete_old(folder, best)

        self._world.on_main(complete)

    def close(self) -> None:
        """End the saver; not collective. After an error, a checkpoint that is not committed is dropped."""
        self._pending = None
        self._copy.close()


@contextlib.contextmanager
def disk_errors(folder: Path, needed: int = 0) -> Iterator[None]:
    """Raise a `CheckpointError` for an `OSError` inside the block; a checkpoint needs `needed` bytes."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "a checkpoint cannot be written",
            where=str(folder),
            got=str(error) + (f"; a checkpoint needs {size(needed)}" if needed else ""),
            remedy="make room and run the same command again: it resumes from the last checkpoint",
        ) from error


def drop_checkpoints(root: Path) -> None:
    """Delete every checkpoint below `root` but the best ones; on one rank."""
    remove_unfinished(root)
    best, folders = best_checkpoints(root), checkpoint_folders(root)
    kept = [folder for folder in folders if folder.name in best]
    for folder in set(folders) - set(kept):
        shutil.rmtree(folder, ignore_errors=True)
    if kept:
        write_text(root / _LATEST, kept[0].name)
    else:
        (root / _LATEST).unlink(missing_ok=True)


def remove_unfinished(root: Path) -> None:
    """Remove what killed starts have left below `root`; on one rank, which no other start writes beside.

    A checkpoint that was moved aside, to be replaced by another one of its step, gets its name back.
    """
    for left in sorted(root.glob("*")):
        final = final_name(left)
        if not is_temporary(left) or (step_of(final.name) is None and final.name not in (_LATEST, BEST)):
            continue
        recover_folder(final)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
