"""Requests to stop a run early, by signals, limits or a tracker."""

import contextlib
import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from dpo_dist.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
# Ctrl-C reaches the processes from the terminal and again from their launcher.
_REPEATED_SECONDS = 1.0
_OF_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Vote on whether to save a checkpoint and stop before the schedule ends.

    Args:
        stop_after_steps: steps of this start after which to stop; None: no limit.
        max_seconds: seconds from now after which to stop; None: no limit.
    """

    def __init__(self, stop_after_steps: int | None = None, max_seconds: float | None = None):
        self._steps_left = math.inf if stop_after_steps is None else stop_after_steps
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self._is_deferred, self._is_urgent = False, False
        self._first_signal = math.inf
        self.reason = ""

    def ask(self, reason: str) -> None:
        """Stop as soon as the progress can be saved; thread-safe."""
        self.reason, self._is_urgent = self.reason or reason, True

    def vote(self) -> bool:
        """Return whether this rank wants to stop after the step just done."""
        self._steps_left -= 1
        if self._steps_left <= 0:
            self.reason = self.reason or "trainer.stop_after_steps"
        return self.is_urgent or bool(self.reason)

    @property
    def is_urgent(self) -> bool:
        """Return whether this rank wants to stop before an evaluation is complete."""
        if time.monotonic() > self._deadline:
            self.ask("trainer.max_seconds")
        return self._is_urgent

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Answer SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and the end of `max_seconds` inside the block.

        The first signal asks to stop within `deferred`, and raises elsewhere. One more than a second later
        ends the process at once. Outside of the main thread, where Python answers no signals, nothing is
        changed. If the launcher of this process dies, that counts as SIGTERM.

        Raises:
            StoppedError: at the first signal, outside of `deferred`.
            ForcedStop: at the second signal.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        is_launched = any(name in os.environ for name in _OF_LAUNCHERS)
        if is_launched:
            _ask_for_parent_death_signal(signal.SIGTERM)
        if self._deadline < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, self._deadline - time.monotonic()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if is_launched:
                _ask_for_parent_death_signal(0)
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Take signals inside the block as requests, which the block votes on."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now, is_limit = time.monotonic(), number == signal.SIGALRM
        if now > self._first_signal + _REPEATED_SECONDS and not is_limit:
            raise ForcedStop(number)
        if self._first_signal < math.inf or (is_limit and self.reason):
            return
        if not is_limit:
            self._first_signal = now
        name = "trainer.max_seconds" if is_limit else signal.Signals(number).name
        self.ask(name)
        if not self._is_deferred:
            raise StoppedError(
                f"stopped by {name} outside of the training steps",
                remedy="run the same command again to continue",
            )


def _ask_for_parent_death_signal(number: int) -> None:
    """Have Linux send this process a signal when its parent dies (0: none); other systems cannot."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


class ForcedStop(SystemExit):
    """A second signal: the process ends without waiting for anything."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Terminated(SystemExit):
    """SIGTERM, as an exception."""


def raise_terminated(_number: int, _frame: FrameType | None) -> None:
    """Handle SIGTERM by raising `Terminated` in the main thread."""
    raise Terminated(128 + signal.SIGTERM)
