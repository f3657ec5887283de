"""Waits for ranks that still work: as long as each of them sends heartbeats, without a limit."""

from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

_UNLIMITED = timedelta(days=365)


class Waits:
    """Waits of the main thread for the other ranks; the thread that reads their heartbeats may end one.

    A collective call times out, and answers signals when it returns. These waits do neither.
    """

    def __init__(self) -> None:
        self._answer = SimpleQueue[bool]()

    def wait(self, group: Any, seconds: float | None = None) -> None:
        """Wait until every rank of `group` is here; collective.

        A barrier, in which every rank waits for every other one, so that all notice a dead one.

        If a signal raises an error meanwhile, the call is still under way: no other call may follow, and the
        error must leave `World.watch`, and so must a `TimeoutError`.

        Args:
            group: of ranks.
            seconds: limit; None: none.

        Raises:
            RuntimeError: a rank has ended, or was silent for the whole timeout.
            TimeoutError: a rank has not come within `seconds`.
        """
        options = dist.BarrierOptions()
        options.device_ids, options.timeout = [], _UNLIMITED
        answer = self._answer = SimpleQueue[bool]()
        call = group.barrier(options)
        call.get_future().add_done_callback(lambda _: answer.put(True))
        try:
            has_arrived = answer.get(timeout=seconds)
        except Empty:
            raise TimeoutError(f"a rank has not come within {seconds:.0f} s") from None
        if not has_arrived:
            raise RuntimeError("timed out, because a rank is silent or has ended")
        call.wait()  # raises its error

    def give_up(self) -> None:
        """End the present wait with an error; from any thread."""
        self._answer.put(False)
