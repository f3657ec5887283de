"""Requests to stop a run early, and SIGTERM as an exception."""

import math
import signal
import time
from types import FrameType


class StopRequest:
    """Vote on whether to save a checkpoint and stop before the schedule ends.

    Args:
        stop_after_steps: steps of this start after which to stop; None: no limit.
        max_seconds: seconds from now after which to stop; None: no limit.
    """

    def __init__(self, stop_after_steps: int | None, max_seconds: float | None):
        self._steps_left = math.inf if stop_after_steps is None else stop_after_steps
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self._asked = False

    def ask(self) -> None:
        """Stop after the current step; thread-safe."""
        self._asked = True

    def vote(self, is_main: bool) -> bool:
        """Return whether this rank wants to stop after the step just done; only rank 0's clock counts."""
        self._steps_left -= 1
        return self._asked or self._steps_left <= 0 or (is_main and time.monotonic() > self._deadline)


class Terminated(SystemExit):
    """SIGTERM, as an exception."""


def raise_terminated(_number: int, _frame: FrameType | None) -> None:
    """Handle SIGTERM by raising `Terminated` in the main thread."""
    raise Terminated(128 + signal.SIGTERM)
