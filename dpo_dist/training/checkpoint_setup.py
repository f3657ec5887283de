"""Set up the saving of checkpoints: room on the disk, and the saver of a run."""

from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.distributed.slices import Sharded
from dpo_dist.distributed.world import World
from dpo_dist.errors import RunOutcome
from dpo_dist.report.terminal.console import Console
from dpo_dist.training.disk_room import Sizes, check_disk_room
from dpo_dist.training.run_start import Start
from dpo_dist.training.run_state import Identity, RunState, write_state


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
        behind=config.trainer.save_behind,
        say=console.say,
        committed=lambda step: write_state(folder, RunState(RunOutcome.started, step, identity)),
    )
