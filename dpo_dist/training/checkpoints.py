"""Look for room for the checkpoints and the model of a run on the file system of its directory."""

import contextlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.config.schema import RunConfig, TrainerConfig
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.distributed.manifest import has_all_files, read_manifest
from dpo_dist.distributed.slices import ModelSlices, Sharded
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import SHARDS, STATES_OF_ADAM
from dpo_dist.foundation.errors import ConfigError, RunOutcome
from dpo_dist.foundation.text import size
from dpo_dist.insight.console import Console
from dpo_dist.model.adapter_weights import AdapterWeights, read_adapter
from dpo_dist.model.folder import weight_files
from dpo_dist.model.load import TORCH_DTYPES
from dpo_dist.model.save import read_description, read_tokenizer
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.start import Start
from dpo_dist.training.state import Identity, RunState, write_state

_MASTER_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a run writes, over all ranks: a checkpoint after the first step, and the model."""

    checkpoint: int
    model: int

    @classmethod
    def of_slices(cls, parts: Sequence[ModelSlices], config: RunConfig, world: World) -> "Sizes":
        """Return the exact sizes; collective.

        Args:
            parts: this rank's slices, of the policy first.
        """
        mine = sum(part.full_bytes for part in parts), parts[0].elements
        checkpoints, elements = zip(*world.gather(mine), strict=True)
        return cls(sum(checkpoints), sum(elements) * TORCH_DTYPES[config.model.dtype].itemsize)

    @classmethod
    def of_files(cls, folder: Path, config: RunConfig) -> "Sizes":
        """Return the sizes of a run that trains all weights of a model folder, before it is loaded.

        A file that cannot be read counts as nothing: loading the model reports it.
        """
        elements = 0
        for file in weight_files(folder):
            with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
                shapes = (opened.get_slice(name).get_shape() for name in opened.keys())  # noqa: SIM118
                elements += sum(map(math.prod, shapes))
        itemsize = TORCH_DTYPES[config.model.dtype].itemsize
        return cls(elements * _bytes_per_weight(config), elements * itemsize)

    @classmethod
    def of_checkpoint(cls, folder: Path, config: RunConfig) -> "Sizes":
        """Return the sizes of a run that continues from a checkpoint, whose manifest has been checked."""
        sizes = {name: entry["bytes"] for name, entry in read_manifest(folder).items()}
        policy = sum(size for name, size in sizes.items() if name.startswith(f"{SHARDS}/"))
        elements = policy // _bytes_per_weight(config)
        return cls(sum(sizes.values()), elements * TORCH_DTYPES[config.model.dtype].itemsize)


def _bytes_per_weight(config: RunConfig) -> int:
    """Return the bytes of a weight in a checkpoint: master weight, states, and moving average."""
    states = STATES_OF_ADAM[config.optim.kind]
    return int(_MASTER_BYTES * (1 + states + (config.trainer.ema_decay is not None)))


def check_disk_room(
    config: RunConfig, sizes: Sizes, steps_done: int, steps: int, world: World, console: Console
) -> None:
    """Check that the file system of `run.dir` has room for everything that the run will write; collective.

    Args:
        config: of the run.
        sizes: of a checkpoint and of the model.
        steps_done: before this start.
        steps: of the whole run.
        world: of this start.
        console: for a file system that does not report its size.

    Raises:
        ConfigError: it has not.
    """
    folder = RunFolder.of(config)

    def work() -> str:
        disk = shutil.disk_usage(folder.path)
        if not disk.total:
            return f"the file system of {folder} reports no size: its room for checkpoints is not known"
        there = sum(map(has_all_files, checkpoint_folders(folder.checkpoints)))
        added, needed = _needed(sizes, there, steps_done, steps, config.trainer)
        if needed > disk.free:
            raise ConfigError(
                "the disk has no room for the checkpoints and the model of this run",
                where="run.dir",
                got=f"{size(disk.free)} free on the file system of {folder}, "
                f"{size(needed - disk.free)} too few",
                expected=f"{size(needed)}, for checkpoints of {size(sizes.checkpoint)}, up to {added} more "
                f"at a time than there are, and a model of {size(sizes.model)}",
                remedy="make room, set run.dir to another disk, or lower trainer.keep_last",
            )
        return ""

    if said := world.on_main(work):
        console.say(said)


def _needed(sizes: Sizes, there: int, steps_done: int, steps: int, trainer: TrainerConfig) -> tuple[int, int]:
    """Return the most checkpoints that the rest of a run adds at a time, and the bytes that it needs.

    A checkpoint is complete before an older one is deleted; the model is written beside those that are kept.
    """
    if steps_done >= steps:  # only the model is missing
        return 0, sizes.model
    kept = max(1, trainer.keep_last) + bool(trainer.keep_best)
    borders = trainer.save_every, trainer.eval_every if trainer.keep_best else 0
    saves = 1 + sum((steps - 1) // every - steps_done // every for every in borders if every)
    added = max(1, min(saves, kept + 1 - there))
    at_end = min(there + saves, kept) - there
    return added, max(added * sizes.checkpoint, at_end * sizes.checkpoint + sizes.model)


@dataclass(frozen=True)
class KeptFiles:
    """Contents of files, in the host memory of rank 0; other ranks have none.

    Attributes:
        below: the adapter below the trained one, if there is one.
        tokenizer: files of the tokenizer by name; None: transformers writes new ones.
        description: files from `read_description` of the base; None: transformers writes new ones.
    """

    below: AdapterWeights | None = None
    tokenizer: Mapping[str, bytes] | None = None
    description: Mapping[str, bytes] | None = None


def keep_files(config: RunConfig, inputs: Inputs, world: World) -> KeptFiles:
    """Read the files after the policy is loaded; collective.

    Raises:
        ConfigError: an adapter cannot be read.
    """

    def read() -> KeptFiles:
        if not world.is_main:
            return KeptFiles()
        adapter, start = config.model.adapter, inputs.policy_files.adapter
        is_below = adapter is not None and adapter.on_top and start is not None
        below = read_adapter(start) if is_below and start is not None else None
        is_chosen = config.data.chat_template is not None
        tokenizer = None if is_chosen else read_tokenizer(inputs.tokenizer_files) or None
        return KeptFiles(below, tokenizer, read_description(inputs.policy_files.folder))

    return world.together(read)


def look_for_room(
    config: RunConfig, start: Start, model: Path, steps: int, world: World, console: Console
) -> None:
    """Check the room on the disk before models are loaded, except of a new adapter; collective.

    Args:
        config: of the run.
        start: of this start.
        model: folder of the model that the policy starts from.
        steps: of the whole run.
        world: of this start.
        console: of this rank.

    Raises:
        ConfigError: there is too little.
    """
    if start.checkpoint is not None:
        former = start.checkpoint.folder
        sizes = world.on_main(lambda: Sizes.of_checkpoint(former, config))
    elif config.model.adapter is None:
        sizes = world.on_main(lambda: Sizes.of_files(model, config))
    else:
        return
    check_disk_room(config, sizes, start.step, steps, world, console)


def open_saver(
    config: RunConfig,
    start: Start,
    steps: int,
    parts: Sequence[Sharded],
    identity: Identity,
    world: World,
    console: Console,
) -> CheckpointSaver:
    """Return the saver of a run whose disk has room for its checkpoints; collective.

    Args:
        parts: the weights that training changes, of the policy first; the others as `look_for_room`.
        identity: digests of the run's inputs.

    Raises:
        ConfigError: there is too little room.
    """
    sizes = Sizes.of_slices([part.shards() for part in parts], config, world)
    check_disk_room(config, sizes, start.step, steps, world, console)
    folder = RunFolder.of(config)
    return CheckpointSaver(
        folder.checkpoints,
        config.trainer.keep_last,
        parts,
        world,
        () if start.checkpoint is None else start.checkpoint.damaged,
        say=console.say,
        committed=lambda step: write_state(folder, RunState(RunOutcome.started, step, identity)),
    )
