"""The processes of a run from start to end, as a context."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from dpo_dist.distributed.world import World, start_world, stop_world


@contextlib.contextmanager
def joined(
    deepspeed_config: dict[str, Any], timeout_seconds: int, show: Callable[[str], None]
) -> Iterator[World]:
    """Yield the processes that the launcher started, and watch them until the end of the block.

    Args:
        deepspeed_config: from `policy_config`: loading weights depends on it.
        timeout_seconds: timeout of a collective call.
        show: prints an error on the screen, on any rank.
    """
    world = start_world(deepspeed_config, timeout_seconds)
    try:
        with world.watch(show):
            yield world
    except BaseException:
        if world.size == 1:  # with others, leaving could wait for a rank that has not failed
            stop_world()
        raise
    stop_world()
