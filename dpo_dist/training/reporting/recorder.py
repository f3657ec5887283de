"""The recorder of a run on rank 0: metrics rows go to files and trackers, and the summary to the screen."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from dpo_dist.config.identity import title
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.signals import BY_TRACKER
from dpo_dist.objective.metrics import PairColumn, PairValues
from dpo_dist.training.reporting.metrics_log import MetricsLog, MetricsRow, log_position
from dpo_dist.training.reporting.protocols import OnMoment, Reporting
from dpo_dist.training.reporting.trackers import Trackers, open_trackers
from dpo_dist.training.reporting.wandb_run import TrackedRun
from dpo_dist.training.start.inputs import Inputs
from dpo_dist.training.start.open_run import Run

OnRow = Callable[[MetricsRow], bool | None]
"""Called with each metrics row after it is recorded; if it returns true, the run stops."""


@dataclass(frozen=True)
class PlainRecorder:
    """Metrics files and trackers of one run; see `protocols.Recorder`."""

    run: Run
    metrics: MetricsLog
    trackers: Trackers = field(default_factory=Trackers)
    on_row: OnRow | None = None

    def row(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Write a metrics row, and send it to the trackers."""
        self.metrics.append(row)
        self.trackers.log(row, margins)
        if self.on_row is not None and self.on_row(dict(row)):
            self.run.stops.request.ask("on_row")

    def evaluation(self, means: dict[str, float], values: PairValues, inputs: Inputs) -> None:
        """Write nothing: the metrics row has the means."""

    def close(self, summary: Mapping[str, Any], outcome: RunOutcome) -> None:
        """Write and print the summary, and end tracking."""
        final_summary = {**summary, "exit": outcome.value}
        self.metrics.close(final_summary)
        self.end(final_summary, [f"{outcome.value}: {self.run.folder.summary}"])

    def end(self, summary: Mapping[str, Any], lines: list[str]) -> None:
        """End tracking, and print a whole summary: `lines` for people."""
        self.trackers.finish(summary["exit"], summary)
        self.run.console.result("summary", {"run_dir": str(self.run.folder.path), **summary}, lines)

    def close_on_error(self) -> AbstractContextManager[None]:
        """Return a context that ends tracking within seconds if its block raises or is interrupted."""
        return self.trackers.finish_on_error()


def opened_trackers(run: Run, metrics: MetricsLog, max_samples: int = 0) -> Trackers:
    """Return the trackers of a run, of which W&B may ask the run to stop.

    `max_samples`: texts of the data may go to a server only if the user asked for samples.
    """
    ask = partial(run.stops.request.ask, BY_TRACKER)
    environment = json.loads(run.folder.environment.read_bytes())
    end = max(map(log_position, metrics.rows), default=-1.0)
    return open_trackers(tracked_run(run, environment, ask, max_samples), end, run.console)


def tracked_run(
    run: Run, environment: Mapping[str, Any], stop: Callable[[], None], max_samples: int = 0
) -> TrackedRun:
    """Return what trackers show of a run; they call `stop` if someone stops the run on their page."""
    return TrackedRun(
        run.folder,
        run.config.tracking,
        title(run.config, run.folder.path),
        settings={**asdict(run.config), "environment": environment},
        max_samples=max_samples,
        stop=stop,
    )


def plain_reporting(on_row: OnRow | None = None, on_moment: OnMoment | None = None) -> Reporting:
    """Return what reports on a run without tools: no samples, no page, no model card."""

    def open_recorder(run: Run, metrics: MetricsLog) -> PlainRecorder:
        return PlainRecorder(run, metrics, opened_trackers(run, metrics), on_row)

    return Reporting(
        open_recorder,
        run_card=lambda *_, **__: "",
        prepare_samples=lambda *_: None,
        write_page=lambda _: None,
        on_moment=on_moment,
    )
