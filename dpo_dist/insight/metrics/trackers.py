"""The trackers of a run: each gets every metrics row, in a thread of its own."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from accelerate.tracking import TensorBoardTracker

from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import OtherTracker, RunConfig, WandbMode
from dpo_dist.foundation.errors import RunOutcome, StoppedError, first_line
from dpo_dist.foundation.text import without_secrets
from dpo_dist.insight.metrics.names import Histogram, RowOrder, order_of, wandb_names
from dpo_dist.insight.metrics.wandb import kill_services, open_tracker, services, staged_in, upload_command

_FIRST_WAIT_SECONDS = 10.0
_FINISH_SECONDS = 30.0
_ERROR_SECONDS = 4.0
_LAST_SECONDS = 2.0

Row = Mapping[str, float]
Say = Callable[[str], None]

_log = logging.getLogger(__name__)


class RowTracker(Protocol):
    """A program that shows metrics rows; all calls come from one thread."""

    def log(self, row: Row, margins: Histogram | None = None) -> None:
        """Send one metrics row, and the margins of its evaluation."""

    def alert(self, title: str, text: str) -> None:
        """Show an alarm."""

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Send the summary and close the run."""


class TensorBoard:
    """TensorBoard's event files, by accelerate's tracker; a resumed run replaces its later steps."""

    def __init__(self, config: RunConfig, folder: RunFolder, rows: Sequence[Row]):
        place = folder.tensorboard
        self._received = order_of(rows[-1]) if rows and any(place.glob("events.*")) else RowOrder()
        self._tracker = TensorBoardTracker(place.name, place.parent, purge_step=int(self._received.step) + 1)
        self._tracker.start()
        if not rows:
            lines = [f"    {name}: {value}" for name, value in without_secrets(settings(config)).items()]
            self._tracker.tracker.add_text("settings", "\n".join(lines))
        for row in rows:
            self.log(row)

    def log(self, row: Row, margins: Histogram | None = None) -> None:
        """Send a row under its names in W&B; a histogram is not sent."""
        del margins
        if order_of(row) > self._received:
            self._tracker.log(wandb_names(row), step=int(row["step"]))
            self._received = order_of(row)

    def alert(self, title: str, text: str) -> None:
        """Nothing: it has no alarms."""

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close the files."""
        del outcome, summary
        self._tracker.finish()


class InBackground:
    """A tracker that is opened and called in a thread of its own; no method but `finish` waits.

    Args:
        name: for messages.
        start: opens the tracker; takes a function for what a user should know. None: there is no tracker.
        say: called, also from the thread, with that, and with the reason if the tracker fails.
        remedy: advice if the tracker has to be ended.
        abandon: ends a call of the tracker that does not return.
        first_wait: seconds to wait for `start`, so that its messages come in order if it is fast.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[Say], RowTracker | None],
        say: Say,
        remedy: str = "",
        abandon: Callable[[], None] = lambda: None,
        first_wait: float = 0.0,
    ):
        self._name, self._tell, self._remedy, self._abandon = name, say, remedy, abandon
        self._is_abandoned = False
        self._calls: queue.SimpleQueue[Callable[[RowTracker], None] | None] = queue.SimpleQueue()
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()
        self._is_open.wait(first_wait)

    def log(self, row: Row, margins: Histogram | None = None) -> None:
        """Send one metrics row later, in order."""
        self._calls.put(lambda tracker: tracker.log(row, margins))

    def alert(self, title: str, text: str) -> None:
        """Show an alarm later, in order."""
        self._calls.put(lambda tracker: tracker.alert(title, text))

    def finish(self, outcome: str, summary: Mapping[str, Any], seconds: float) -> None:
        """Close the run; return after about `seconds` even if a call does not return."""
        self._calls.put(lambda tracker: tracker.finish(outcome, summary))
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"{self._name} has not finished after {seconds:.0f} s and is ended{self._remedy}")
            self._is_abandoned = True
            with contextlib.suppress(Exception):
                self._abandon()
            self._thread.join(_LAST_SECONDS)

    def _work(self, start: Callable[[Say], RowTracker | None]) -> None:
        try:
            tracker = start(self._say)
            self._is_open.set()
            while tracker is not None and (call := self._calls.get()) is not None:
                call(tracker)
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


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run; none if tracking is off."""

    open: tuple[InBackground, ...] = ()
    finish_seconds: float = _FINISH_SECONDS
    until_closed: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def log(self, row: Row, margins: Histogram | None = None) -> None:
        """Send one metrics row, and the margins of its evaluation; does not wait."""
        for tracker in self.open:
            tracker.log(row, margins)

    def alert(self, title: str, text: str) -> None:
        """Show an alarm; does not wait."""
        for tracker in self.open:
            tracker.alert(title, text)

    def finish(self, outcome: str, summary: Mapping[str, Any], seconds: float | None = None) -> None:
        """Close all; waits at most `seconds` (default: `finish_seconds`) for each."""
        for tracker in self.open:
            tracker.finish(outcome, summary, self.finish_seconds if seconds is None else seconds)
        self.until_closed.close()

    @contextlib.contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """If the block ends in error or is interrupted, close all in a few seconds, with all rows so far."""
        try:
            yield
        except BaseException as error:
            is_stop = isinstance(error, StoppedError)
            self.finish(RunOutcome.preempted if is_stop else "failed", {}, _ERROR_SECONDS)
            raise


def open_trackers(
    config: RunConfig,
    folder: RunFolder,
    request_stop: Callable[[], None],
    *,
    rows: Sequence[Row],
    environment: Mapping[str, Any],
    say: Say,
) -> Trackers:
    """Start or resume the trackers of a run; never raises, and does not wait for a server that is slow.

    Args:
        config: of the run.
        folder: the run directory.
        request_stop: called from another thread if someone stops the run on its W&B page.
        rows: metrics rows up to the checkpoint that training resumes from.
        environment: content of `environment.json`.
        say: called, also from other threads, with what a user should know.
    """
    trackers, until_closed, known = [], contextlib.ExitStack(), list(rows)
    if config.tracking.wandb is not WandbMode.off:

        def start(say: Say) -> RowTracker | None:
            return open_tracker(config, folder, request_stop, rows=known, environment=environment, say=say)

        until_closed.enter_context(staged_in(folder))
        remedy, abandon = f"; later: {upload_command(folder)}", partial(kill_services, services())
        trackers.append(InBackground("wandb", start, say, remedy, abandon, _FIRST_WAIT_SECONDS))
    if OtherTracker.tensorboard in config.tracking.also:
        trackers.append(InBackground("tensorboard", lambda _say: TensorBoard(config, folder, known), say))
    return Trackers(tuple(trackers), until_closed=until_closed)
