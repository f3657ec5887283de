"""The trackers of a run, which get every metrics row; an error of one of them is a warning."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accelerate.tracking import TensorBoardTracker

from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import OtherTracker, RunConfig, WandbMode
from dpo_dist.foundation.errors import RunOutcome, StoppedError, first_line
from dpo_dist.foundation.text import without_secrets
from dpo_dist.insight.metrics.names import Row, RowOrder, order_of, wandb_names
from dpo_dist.insight.metrics.wandb import InBackground, Margins, Say, open_tracker

_FINISH_SECONDS = 30.0
_ERROR_SECONDS = 4.0

_log = logging.getLogger(__name__)


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

    def log(self, row: Row, margins: Margins | None = None) -> None:  # noqa: ARG002
        """Show a row under its names in W&B."""
        if order_of(row) > self._received:
            self._tracker.log(wandb_names(row), step=int(row["step"]))
            self._received = order_of(row)

    def alert(self, title: str, text: str) -> None:
        """Nothing: it has no alarms."""

    def finish(self, outcome: str, summary: Mapping[str, Any], seconds: float) -> None:  # noqa: ARG002
        """Close the files."""
        self._tracker.finish()


Tracker = InBackground | TensorBoard


class Trackers:
    """The trackers of a run; none if tracking is off."""

    def __init__(self, trackers: Sequence[Tracker] = (), say: Say = print):
        self._open, self._say = list(trackers), say

    def log(self, row: Row, margins: Margins | None = None) -> None:
        """Send one metrics row, and the margins of its evaluation; does not wait for a server."""
        self._each(lambda tracker: tracker.log(row, margins))

    def alert(self, title: str, text: str) -> None:
        """Show an alarm; does not wait for a server."""
        self._each(lambda tracker: tracker.alert(title, text))

    def finish(self, outcome: str, summary: Mapping[str, Any], seconds: float = _FINISH_SECONDS) -> None:
        """Close all; waits at most `seconds` for each."""
        self._each(lambda tracker: tracker.finish(outcome, summary, seconds))

    @contextlib.contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """If the block ends in error or is interrupted, close all in a few seconds, with all rows so far."""
        try:
            yield
        except BaseException as error:
            is_stop = isinstance(error, StoppedError)
            self.finish(RunOutcome.preempted if is_stop else "failed", {}, _ERROR_SECONDS)
            raise

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._open):
            try:
                call(tracker)
            except Exception as error:
                self._open.remove(tracker)
                warning = f"{type(tracker).__name__} stops, training continues: {first_line(error)}"
                _log.warning(warning)
                self._say(f"warning: {warning}")


def open_trackers(
    config: RunConfig,
    folder: RunFolder,
    request_stop: Callable[[], None],
    *,
    rows: Sequence[Row],
    environment: Mapping[str, Any],
    say: Say,
) -> Trackers:
    """Start or resume the trackers of a run; does not wait for a server that is slow.

    `rows` are those up to the checkpoint that training resumes from. `request_stop`, if someone stops the run
    on its W&B page, and `say` are also called from other threads.
    """
    trackers: list[Tracker] = []
    if config.tracking.wandb is not WandbMode.off:
        known = list(rows)
        trackers.append(
            InBackground(
                lambda say: open_tracker(
                    config, folder, request_stop, rows=known, environment=environment, say=say
                ),
                say,
                folder,
            )
        )
    if OtherTracker.tensorboard in config.tracking.also:
        trackers.append(TensorBoard(config, folder, rows))
    return Trackers(trackers, say)
