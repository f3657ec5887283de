"""Check that the processes of a start can load the shards of a checkpoint."""

from dpo_dist.config.schema import ParallelismConfig
from dpo_dist.distributed.checkpoint import Checkpoint
from dpo_dist.distributed.world import World
from dpo_dist.errors import CheckpointError
from dpo_dist.number_text import counted

_NEW_RUN = "start from the beginning with another run.dir"


def check_same_processes(checkpoint: Checkpoint, parallelism: ParallelismConfig, world: World) -> None:
    """Check that the checkpoint has the same number of ranks, sharding and optimizer as this run.

    Args:
        checkpoint: to load.
        parallelism: of this start.
        world: of this start.

    Raises:
        CheckpointError: its shards or optimizer states cannot be loaded by these processes.
    """
    saved_ranks = checkpoint.state["world_size"]
    if saved_ranks != world.size:
        raise CheckpointError(
            "the checkpoint was written by a different number of processes",
            where=str(checkpoint.folder),
            got=counted(world.size, "process", "processes"),
            expected=f"{saved_ranks}",
            remedy=f"launch {counted(saved_ranks, 'process', 'processes')}, or {_NEW_RUN}",
        )
    for key, value in saved_parallelism(parallelism).items():
        saved = checkpoint.state.get(key, value)
        if saved != value:
            raise CheckpointError(
                f"the checkpoint was written with a different {key}",
                where=str(checkpoint.folder),
                got=f"{key}={value}",
                expected=f"{key}={saved}",
                remedy=f"set {key}={saved}, or {_NEW_RUN}",
            )


def saved_parallelism(parallelism: ParallelismConfig) -> dict[str, str]:
    """Return the options that shards and optimizer states depend on, for a checkpoint's state."""
    return {
        "parallelism.kind": parallelism.kind.value,
        "parallelism.offload_optimizer": parallelism.offload_optimizer.value,
    }
