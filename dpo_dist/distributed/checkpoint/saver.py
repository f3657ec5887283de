"""Save checkpoints atomically (law L4), and load them on any number of ranks.

    checkpoints/
      latest                                  name of the last committed checkpoint
      best                                    name of the best one (`trainer.keep_best`)
      step-000100/
        manifest.json                         digest of every other file
        state.json                            state of the loop
        engine/rank-00000-00000.safetensors   slices of weights and optimizer states of rank 0, ...
        reference/rank-00000-00000...         of a reference that follows the policy

All ranks write a checkpoint under a temporary name, and rank 0 its manifest; then the folder is renamed,
`latest` and `best` are updated, and after that older checkpoints are deleted. Only files that match a
manifest are loaded. Training continues while copies of the weights are written, and others deleted, in the
background.
"""

import contextlib
import functools
import itertools
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpo_dist.config.run_folder import (
    BEST_FILE,
    STATE,
    best_checkpoint,
    checkpoint_folders,
    checkpoint_name,
    checkpoint_step,
)
from dpo_dist.distributed.adamw_bf16 import round_by_chance
from dpo_dist.distributed.checkpoint.slices import (
    SHARDS,
    WEIGHT,
    Entries,
    HostCopy,
    ModelSlices,
    Slice,
    SlicedWeights,
    write_slices,
)
from dpo_dist.distributed.processes.world import World
from dpo_dist.foundation.errors import DISK_IS_FULL, CheckpointError, ConfigError, first_line
from dpo_dist.foundation.files import (
    commit_folder,
    content_digest,
    final_name,
    is_temporary,
    read_fields,
    recover_folder,
    temporary_name,
    text_digest,
    write_text,
)
from dpo_dist.foundation.process import note_progress
from dpo_dist.foundation.text import size, without_secrets
from dpo_dist.model.library_internals import whole_shape

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Files of the checkpoint alone: in a stranger's, any other name could be a device, which is read for ever.
_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
LATEST = "latest"


def read_manifest(folder: Path) -> Entries:
    """Return the entries in the manifest of `folder`; ConfigError for a file that is none."""
    entries: Entries = read_fields(folder / MANIFEST)
    if not entries or not all(map(_NAME.fullmatch, entries)):
        raise ConfigError(
            "this manifest is not of a checkpoint",
            where=str(folder / MANIFEST),
            got="no file, or a name of no file of a checkpoint",
            remedy="restore the file",
        )
    return entries


def find_faults(folder: Path, part: int, parts: int) -> list[str]:
    """Read every `parts`-th file of the manifest, starting at `part`, and return the faults found."""
    try:
        entries = read_manifest(folder)
    except ConfigError as error:
        return [f"{MANIFEST}: {error.got}"]
    faults = []
    for name in sorted(entries)[part::parts]:
        try:
            if content_digest([folder / name]) != entries[name]:
                faults.append(f"{name} differs from its digest")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror}")
    return faults


def damaged_checkpoint(folder: Path, faults: Sequence[str]) -> CheckpointError:
    """Return the error for a checkpoint with `faults`."""
    return CheckpointError(
        "the checkpoint is damaged, was removed, or belongs to another model",
        where=str(folder),
        got="; ".join(faults[:5]),
        remedy="restore its files, or name another checkpoint: a run in training keeps the last "
        "trainer.keep_last",
    )


@dataclass(frozen=True)
class SavedSlices:
    """The slices of one model in a checkpoint: shapes of whole weights, names of parts, number of updates.

    `_ranges` has start, end and file of each saved range of elements, by the tensor's key, PART/NAME.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    parts: Sequence[str]
    step: int
    _ranges: dict[str, list[tuple[int, int, str]]]

    @classmethod
    def find(cls, folder: Path, name: str) -> "SavedSlices":
        """Return the slices below `folder / name`, from the headers of their files."""
        shapes: dict[str, tuple[int, ...]] = {}
        ranges: dict[str, list[tuple[int, int, str]]] = {}
        step = 0
        with reading_errors(folder):
            files = [file for file in read_manifest(folder) if Path(file).match(f"{name}/*.safetensors")]
            if not files:
                raise ValueError(f"it has no {name}/*.safetensors")
            for file in files:
                with safe_open(folder / file, "pt") as opened:
                    header = opened.metadata()
                    starts = json.loads(header["ranges"])
                    step = int(header["step"])
                    shapes |= {weight: tuple(shape) for weight, (_, *shape) in starts.items()}
                    for key in opened.keys():  # noqa: SIM118  (the file is not iterable)
                        start, *_ = starts[key.partition("/")[2]]
                        end = start + opened.get_slice(key).get_shape()[0]
                        ranges.setdefault(key, []).append((start, end, file))
        parts = dict.fromkeys(key.partition("/")[0] for key in ranges)
        return cls(folder, shapes, list(parts), step, {key: sorted(each) for key, each in ranges.items()})

    def load_into(self, slices: Iterable[Slice], seed: int = 0) -> None:
        """Fill the parts of `slices`, also from other ranges.

        float32 values become bf16 by the chance of `seed`: to the nearest, all moves of a weight below half a
        step of bf16 would be lost.
        """
        with reading_errors(self.folder), contextlib.ExitStack() as stack:

            @functools.cache
            def opened(file: str) -> Any:
                return stack.enter_context(safe_open(self.folder / file, "pt"))

            for piece in slices:
                if self.shapes.get(piece.name) != piece.shape:
                    raise ValueError(f"{piece.name} is missing or has another shape")
                for part, target in piece.parts.items():
                    key = f"{part}/{piece.name}"
                    for start, stop, file in self._ranges[key]:
                        first = max(piece.start, start)
                        last = min(piece.start + target.numel(), stop)
                        if first < last:
                            values = opened(file).get_slice(key)[first - start : last - start]
                            if values.dtype is torch.float32 and target.dtype is torch.bfloat16:
                                values = round_by_chance(values, seed, "load", key, first)
                            target[first - piece.start : last - piece.start].copy_(values)

    def whole(self, name: str, part: str = WEIGHT) -> Tensor:
        """Return a whole weight or optimizer state in host memory; trained weights are float32, or bf16."""
        with reading_errors(self.folder):
            pieces = []
            for _, _, file in self._ranges[f"{part}/{name}"]:
                with safe_open(self.folder / file, "pt") as opened:
                    pieces.append(opened.get_tensor(f"{part}/{name}"))
            return torch.cat(pieces).view(self.shapes[name])

    def whole_in(self, dtype: torch.dtype, name: str, part: str = WEIGHT) -> Tensor:
        """Return a whole weight or state in `dtype`; float32 becomes bf16 by a chance of its own.

        To the nearest, moves of a weight below half a step of bf16 would be lost, which at rates of 1e-6 are
        nearly all. In benchmarks/log.md: "What is learnt at small rates".
        """
        values = self.whole(name, part)
        if values.dtype is torch.float32 and dtype is torch.bfloat16:
            return round_by_chance(values, self.step, "save", f"{part}/{name}")
        return values.to(dtype)


@contextlib.contextmanager
def reading_errors(folder: Path) -> Iterator[None]:
    """Raise a `CheckpointError` for a file that cannot be read or does not belong to a checkpoint."""
    try:
        yield
    except (ConfigError, OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise damaged_checkpoint(folder, [first_line(error)]) from error


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder, the loop's state, and names of newer, damaged checkpoints."""

    folder: Path
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()


def latest_checkpoint(root: Path, world: World) -> Checkpoint | None:
    """Return the newest intact checkpoint; None without any, an error if all are damaged. Collective."""
    # One rank lists: on a network file system the listings of two nodes may differ.
    folders = world.on_main(lambda: checkpoint_folders(root))
    damaged: list[str] = []
    for folder in folders:
        faults = _find_all_faults(folder, world)
        if not faults:
            return Checkpoint(folder, world.on_main(lambda: checkpoint_state(folder)), tuple(damaged))  # noqa: B023
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


def _find_all_faults(folder: Path, world: World) -> list[str]:
    """Return the faults in all files of a checkpoint; the ranks share the reading. Collective."""
    return [*itertools.chain(*world.gather(find_faults(folder, world.rank, world.size)))]


def checkpoint_state(folder: Path) -> dict[str, Any]:
    """Return the loop's state in a checkpoint, without checking its other files; not collective."""
    try:
        return read_fields(folder / STATE)
    except ConfigError as error:
        raise damaged_checkpoint(folder, [f"{STATE}: {error.got}"]) from error


def read_weights(folder: Path, trained: Mapping[str, nn.Parameter]) -> SavedSlices:
    """Return the slices of the weights that a run trains, by transformers name, in a checked checkpoint."""
    saved = SavedSlices.find(folder, SHARDS)
    shapes = {name: whole_shape(weight) for name, weight in trained.items()}
    missing = [name for name, shape in shapes.items() if saved.shapes.get(name) != shape]
    if missing:
        raise CheckpointError(
            "the checkpoint's weights are not the ones that this configuration trains",
            where=str(folder),
            got=f"{len(missing)} of {len(shapes)} weights are missing or have another shape: {missing[0]}",
            remedy="set model.path and model.adapter as in the config.yaml of the checkpoint's run",
        )
    return saved


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is not committed yet: its size, and the entries of this rank's files."""

    temporary: Path
    folder: Path
    state: str
    bytes: int
    entries: Future[Entries] = field(default_factory=Future)

    def write(self, models: Sequence[ModelSlices], rank: int, copy: HostCopy | None = None) -> None:
        """Write slices and set `entries`; nothing may change the slices meanwhile."""
        try:
            entries: Entries = {}
            with disk_errors(self.temporary, self.bytes):
                for model in models:
                    entries |= write_slices(model, self.temporary, rank, copy)
            self.entries.set_result(entries)
        except BaseException as error:  # raised in the main thread, which reads `entries`
            self.entries.set_exception(error)


class CheckpointSaver:
    """Save the checkpoints of one run below `root` and keep the newest `keep_last`, at least one.

    `say` is called with a message on every rank, `in_use` before checkpoints are deleted (it returns those
    that must stay for now), and then `committed` on rank 0 with the step of the committed one.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        parts: Sequence[SlicedWeights],
        world: World,
        *,
        say: Callable[[str], None] = log.warning,
        committed: Callable[[int], None] = lambda _step: None,
        in_use: Callable[[], Collection[Path]] = lambda: (),
    ):
        self._root = root
        self._keep_last = max(1, keep_last)
        self._parts = parts
        self._world = world
        self._damaged: set[Path] = set()
        self._copy = HostCopy(world.device)
        self._say = say
        self._committed = committed
        self._in_use = in_use
        self._pending: _Pending | None = None
        self._deleting: threading.Thread | None = None
        self._has_warned = False
        self._best_step: int | None = None

    def save(
        self, step: int, state: dict[str, Any], *, best_step: int | None = None, is_last: bool = False
    ) -> None:
        """Write `root/step-NNNNNN`, which the next `commit` or `save` commits; collective.

        A background thread writes the files from a copy, unless host memory has no room for it or the
        checkpoint `is_last`. The checkpoint of `best_step`, which may be this one, is kept beside the last
        ones.
        """
        self.commit()
        self._best_step = best_step
        # Collective: the size of all shards, the folder, the room of all hosts, and, where training waits for
        # the files, whether a rank failed.
        world = self._world
        folder = self._root / checkpoint_name(step)
        models = [part.shards() for part in self._parts]
        needed = sum(world.gather(sum(model.bytes for model in models)))

        # One rank makes the folder, and `on_main` lets the others wait for it.
        def create() -> Path:
            with disk_errors(folder):
                self.end_deleting()  # to make room
                remove_unfinished(self._root)
                self._root.mkdir(exist_ok=True)
                temporary = temporary_name(folder)
                temporary.mkdir()
            return temporary

        text = json.dumps(without_secrets(state), indent=1)  # it has the paths and names of sources
        self._pending = pending = _Pending(world.on_main(create), folder, text, needed)
        has_room = is_last or self._copy.has_room(models, world)
        if not has_room and not self._has_warned:
            self._say(
                "training waits while a checkpoint is written: host memory has no room for a copy of it"
            )
            self._has_warned = True
        # From a copy, because the next update changes the weights. At the end nothing happens meanwhile, and
        # the copy would only cost memory.
        if has_room and not is_last:
            arguments = self._copy.fill(models), world.rank
            threading.Thread(target=pending.write, args=arguments, daemon=True).start()
            return
        pending.write(models, world.rank, self._copy)
        self._copy.close()  # host memory is short, or training ends
        if any(world.gather(pending.entries.exception() is not None)):
            self.commit()  # which raises the error on all ranks

    @property
    def is_written(self) -> bool:
        """Return whether this rank wrote its files of the pending checkpoint, or failed; not collective.

        Once all ranks have, `commit` does not wait.
        """
        return self._pending is not None and self._pending.entries.done()

    def commit(self) -> None:
        """Wait for the pending checkpoint, if any, and make it the latest; collective."""
        pending = self._pending
        self._pending = None
        world = self._world
        if pending is None:
            return
        try:
            # All files are on disk before the manifest names them, and only the rename makes the folder a
            # checkpoint: a kill at any moment leaves the last one as it was.
            entries: Entries = {}
            for of_rank in world.gather(world.together(pending.entries.result)):
                entries |= of_rank

            def rename() -> None:
                with disk_errors(pending.temporary, pending.bytes):
                    write_text(pending.temporary / STATE, pending.state)
                    entries[STATE] = text_digest(pending.state)
                    write_text(pending.temporary / MANIFEST, json.dumps(entries, indent=1))
                    commit_folder(pending.temporary, pending.folder, is_synced=True)
                # Names and reports follow; a resume repeats what a kill prevents here.
                self._name(pending.folder)
                note_progress(str(pending.folder))
                self._delete_old(pending.folder)
                self._committed(checkpoint_step(pending.folder.name) or 0)

            world.on_main(rename)
        except CheckpointError:
            if world.is_main:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise

    def _name(self, folder: Path) -> None:
        with disk_errors(folder):
            write_text(self._root / LATEST, folder.name)
            if self._best_step is not None:
                write_text(self._root / BEST_FILE, f"{checkpoint_name(self._best_step)}\n")
            else:
                (self._root / BEST_FILE).unlink(missing_ok=True)

    def _delete_old(self, committed: Path) -> None:
        """Delete in a thread all but `committed`, the best, the newest undamaged ones, and one in use."""
        self.end_deleting()
        others = [folder for folder in checkpoint_folders(self._root) if folder != committed]
        intact = [folder for folder in others if folder not in self._damaged]
        best = [folder for folder in intact if checkpoint_step(folder.name) == self._best_step]
        old = set(others) - {*intact[: self._keep_last - 1], *best, *self._in_use()}
        self._damaged.clear()
        self._deleting = threading.Thread(target=_delete, args=(old,), daemon=True)
        self._deleting.start()

    def end_deleting(self) -> None:
        """Wait until old checkpoints are deleted; not collective."""
        if self._deleting is not None:
            self._deleting.join()

    def resume(self, folder: Path, best_step: int | None) -> None:
        """Update `latest` and `best` and delete old checkpoints, which a kill may have prevented. Collective.

        `folder` is the checkpoint to resume from: newer ones are damaged. `best_step` is the step of the best
        checkpoint.
        """
        self._best_step = best_step

        def complete() -> None:
            self._name(folder)
            folders = checkpoint_folders(self._root)
            self._damaged = set(folders[: folders.index(folder)])
            if not self._damaged:  # else the next commit deletes all of them
                self._delete_old(folder)

        self._world.on_main(complete)

    def close(self) -> None:
        """End the saver: drop an uncommitted checkpoint; not collective."""
        self._pending = None
        self._copy.close()
        self.end_deleting()


def _delete(folders: Iterable[Path]) -> None:
    for folder in folders:  # some file systems need minutes for terabytes
        with contextlib.suppress(OSError):  # at once no checkpoint any more
            shutil.rmtree(folder.rename(temporary_name(folder)))


@contextlib.contextmanager
def disk_errors(folder: Path, needed: int = 0) -> Iterator[None]:
    """Raise a `CheckpointError` for an `OSError` inside the block; a checkpoint needs `needed` bytes."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in DISK_IS_FULL
        cure = "free disk space" if is_full else "make sure that this folder can be written"
        raise CheckpointError(
            "a checkpoint cannot be written",
            where=str(folder),
            got=str(error) + (f"; a checkpoint needs {size(needed)}" if needed else ""),
            remedy=f"{cure}, and run the same command again: it resumes from the last checkpoint",
        ) from error


def drop_checkpoints(root: Path) -> None:
    """Delete every checkpoint below `root` except the best one; on one rank."""
    remove_unfinished(root)
    best = best_checkpoint(root)
    folders = checkpoint_folders(root)
    _delete({folder for folder in folders if folder.name != best})
    if best in [folder.name for folder in folders]:
        write_text(root / LATEST, best)
    else:
        (root / LATEST).unlink(missing_ok=True)


def remove_unfinished(root: Path) -> None:
    """Remove the temporary files of killed runs below `root`; on one rank, while no other run writes there.

    A checkpoint that was renamed to make place for a new one of the same step gets its name back.
    """
    for left in sorted(filter(is_temporary, root.glob("*"))):
        final = final_name(left)
        if checkpoint_step(final.name) is None and final.name not in (LATEST, BEST_FILE):
            continue
        recover_folder(final)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
