"""The groups of a run's processes: for long sequences, for shards of the weights, for experts."""

import contextlib
from collections.abc import Iterator

from dpo_dist.config.schema import ParallelismConfig
from dpo_dist.distributed.expert_groups import with_expert_groups
from dpo_dist.distributed.processes.world import World, with_sequence_groups
from dpo_dist.distributed.shard_groups import shard_groups


@contextlib.contextmanager
def parallel_groups(world: World, parallelism: ParallelismConfig) -> Iterator[World]:
    """Yield `world` with its groups; what the block loads under ZeRO-3 is sharded in them. Collective."""
    in_sequences = with_sequence_groups(world, parallelism.sequence_parallel)
    with shard_groups(in_sequences, parallelism.shard_size) as in_shards:
        yield with_expert_groups(in_shards, parallelism.experts)
