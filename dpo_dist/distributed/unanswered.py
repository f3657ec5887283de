"""Signals that the main thread cannot answer because it is blocked in a collective call.

Python runs a signal's handler in the main thread, between two of its instructions.
"""

import signal
import threading
import time

from dpo_dist.distributed.activity import Doing
from dpo_dist.errors import ExitCode
from dpo_dist.signals import Arrivals

_REQUESTS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGALRM,
)
_ECHO_SECONDS = 2.0
_SAMPLING_SECONDS = 1.2
_WHILE_SILENT_SECONDS = 20.0
_WHILE_WAITING_SECONDS = 120.0


class UnansweredSignals:
    """Signals since the creation of this object, until `close`; nothing is read outside of the main thread.

    Args:
        timeout_seconds: timeout of a collective call; a signal is answered earlier.
    """

    def __init__(self, timeout_seconds: float):
        self.name = ""
        self._first = self._second = 0.0
        self._second_number = 0
        self._while_silent = min(_WHILE_SILENT_SECONDS, timeout_seconds / 2)
        self._while_waiting = min(_WHILE_WAITING_SECONDS, timeout_seconds / 2)
        is_main = threading.current_thread() is threading.main_thread()
        self._arrivals = Arrivals() if is_main else None

    def close(self) -> None:
        """Stop reading signals."""
        if self._arrivals is not None:
            self._arrivals.close()

    def exit_code(self, doing: Doing, *, is_peer_silent: bool) -> int | None:
        """Return the exit code with which to end this process now; None: go on.

        Nothing can be saved while a rank is silent, and a second signal ends a process at once. A main thread
        at another place than before a signal has answered it.

        Args:
            doing: present activity of the main thread.
            is_peer_silent: whether another rank sends no heartbeat.
        """
        self._read()
        if not self._first:
            return None
        now = time.monotonic()
        arrived = now - doing.seconds - _SAMPLING_SECONDS
        if self._second and arrived <= self._second and now - self._second > _SAMPLING_SECONDS:
            return 128 + self._second_number
        waited = now - self._first
        is_in_vain = is_peer_silent and min(waited, doing.seconds) > self._while_silent
        is_blocked = doing.is_blocked and arrived <= self._first and waited > self._while_waiting
        return ExitCode.preempted if is_in_vain or is_blocked else None

    def _read(self) -> None:
        heard = [] if self._arrivals is None else self._arrivals.heard
        for number, at in heard:
            if number in _REQUESTS and not self._first:
                self._first, self.name = at, signal.Signals(number).name
            elif number in _REQUESTS[:-1] and at > self._first + _ECHO_SECONDS and not self._second:
                self._second, self._second_number = at, number
