"""Run a tracker in a thread of its own, so that training waits for no network and no disk."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dpo_dist.errors import first_line
from dpo_dist.report.trackers.histogram import Histogram

_log = logging.getLogger(__name__)


class RowTracker(Protocol):
    """A program that shows metrics rows. Calls come from one thread, except `hurry`."""

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send one metrics row, and the margins of its evaluation."""

    def system(self, values: Mapping[str, float]) -> None:
        """Send system metrics of ranks, by name and rank."""

    def alert(self, title: str, text: str) -> None:
        """Show an alarm."""

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Send the summary and close the run."""

    def hurry(self) -> None:
        """Send nothing but rows and the summary from now on: the time of the end is short."""


class InBackground:
    """A tracker that is opened and called in a thread of its own; no method but `finish` waits.

    Args:
        name: for messages.
        start: opens the tracker; takes a function for what a user should know.
        say: called, also from the thread, with that, and with the reason if the tracker fails.
        remedy: advice if the tracker has to be ended.
        abandon: ends a call of the tracker that does not return.
        first_wait: seconds to wait for `start`, so that its messages come in order if it is fast.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[Callable[[str], None]], RowTracker],
        say: Callable[[str], None],
        remedy: str = "",
        abandon: Callable[[], None] = lambda: None,
        first_wait: float = 0.0,
    ):
        self._name, self._tell, self._remedy, self._abandon = name, say, remedy, abandon
        self._is_abandoned = False
        self._tracker: RowTracker | None = None
        self._actions: queue.SimpleQueue[Callable[[RowTracker], None] | None] = queue.SimpleQueue()
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()
        self._is_open.wait(first_wait)

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send one metrics row later, in order."""
        self._do(lambda tracker: tracker.log(row, margins))

    def system(self, values: Mapping[str, float]) -> None:
        """Send system metrics of ranks later, in order."""
        self._do(lambda tracker: tracker.system(values))

    def alert(self, title: str, text: str) -> None:
        """Show an alarm later, in order."""
        self._do(lambda tracker: tracker.alert(title, text))

    def hurry(self) -> None:
        """Send nothing but rows and the summary from now on."""
        if self._tracker is not None:
            self._tracker.hurry()

    def finish(self, outcome: str, summary: Mapping[str, Any], seconds: float) -> None:
        """Close the run; return after about `seconds` even if a call does not return."""
        self._actions.put(lambda tracker: tracker.finish(outcome, summary))
        self._actions.put(None)
        deadline = time.monotonic() + seconds
        self._thread.join(seconds / 2)
        if self._thread.is_alive():
            self.hurry()
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if not self._thread.is_alive():
            return
        self._warn(f"{self._name} has not finished after {seconds:.0f} s and is ended{self._remedy}")
        self._is_abandoned = True
        with contextlib.suppress(Exception):
            self._abandon()
        self._thread.join(_LAST_SECONDS)

    def _do(self, action: Callable[[RowTracker], None]) -> None:
        if self._thread.is_alive():
            self._actions.put(action)

    def _work(self, start: Callable[[Callable[[str], None]], RowTracker]) -> None:
        try:
            self._tracker = start(self._say)
            self._is_open.set()
            while (action := self._actions.get()) is not None:
                action(self._tracker)
        except Exception as error:
            self._warn(f"{self._name} tracking stops, training continues: {first_line(error)}")
        finally:
            self._is_open.set()

    def _say(self, text: str) -> None:
        if not self._is_abandoned:
            self._tell(text)

    def _warn(self, text: str) -> None:
        _log.warning(text)
        self._say(f"warning: {text}")


_LAST_SECONDS = 2.0
