"""The trackers of a run: each gets every metrics row, in a thread of its own."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.tracking_schema import WandbMode
from dpo_dist.distributed.world import World
from dpo_dist.errors import RunOutcome, StoppedError
from dpo_dist.report.trackers.background import InBackground, RowTracker
from dpo_dist.report.trackers.histogram import Histogram
from dpo_dist.report.trackers.other_trackers import start_of
from dpo_dist.report.trackers.system_metrics import system_metrics
from dpo_dist.report.trackers.wandb_environment import wanted_mode
from dpo_dist.report.trackers.wandb_media import staged_in
from dpo_dist.report.trackers.wandb_session import kill_services, services, upload_command
from dpo_dist.report.trackers.wandb_tracker import open_tracker

_FIRST_WAIT_SECONDS = 10.0
_FINISH_SECONDS = 30.0
_ERROR_SECONDS = 4.0


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run; none if tracking is off."""

    open: tuple[InBackground, ...] = ()
    finish_seconds: float = _FINISH_SECONDS
    until_closed: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send one metrics row, and the margins of its evaluation; does not wait."""
        for tracker in self.open:
            tracker.log(row, margins)

    def system(self, values: Mapping[str, float]) -> None:
        """Send system metrics of ranks, by name and rank; does not wait."""
        for tracker in self.open:
            tracker.system(values)

    def alert(self, title: str, text: str) -> None:
        """Show an alarm; does not wait."""
        for tracker in self.open:
            tracker.alert(title, text)

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close all; waits at most `finish_seconds` for each."""
        for tracker in self.open:
            tracker.finish(outcome, summary, self.finish_seconds)
        self.until_closed.close()

    @contextlib.contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """If the block ends in error or is interrupted, close all in a few seconds, with all rows so far."""
        try:
            yield
        except BaseException as error:
            outcome = RunOutcome.preempted if isinstance(error, StoppedError) else "failed"
            for tracker in self.open:
                tracker.hurry()
                tracker.finish(outcome, {}, _ERROR_SECONDS)
            self.until_closed.close()
            raise


def sampled_system(
    config: RunConfig, world: World, trackers: Trackers | None
) -> contextlib.AbstractContextManager[None]:
    """Return a block in which this rank samples its system metrics for W&B, if that is on; not collective."""
    if wanted_mode(config) is WandbMode.off:
        return contextlib.nullcontext()
    send = None if trackers is None else trackers.system
    return system_metrics(RunFolder.of(config).system_metrics, world, send)


def open_trackers(
    config: RunConfig,
    folder: RunFolder,
    request_stop: Callable[[], None],
    *,
    rows: Sequence[Mapping[str, float]],
    environment: Mapping[str, Any],
    say: Callable[[str], None],
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
    trackers, until_closed = [], contextlib.ExitStack()
    if config.tracking.wandb is not WandbMode.off:
        remedy = f"; later: {upload_command(folder)}"

        def start(say: Callable[[str], None]) -> RowTracker:
            return open_tracker(
                config, folder, request_stop, rows=list(rows), environment=environment, say=say
            )

        until_closed.enter_context(staged_in(folder))
        abandon = partial(kill_services, services())
        trackers.append(InBackground("wandb", start, say, remedy, abandon, _FIRST_WAIT_SECONDS))
    for kind in config.tracking.also:
        trackers.append(InBackground(kind.value, start_of(kind, config, folder, list(rows)), say))
    return Trackers(tuple(trackers), until_closed=until_closed)
