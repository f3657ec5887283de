"""The recorder of a run on rank 0: metrics rows go to files and trackers, and the summary to the screen."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from dpo_dist.config.identity import title
from dpo_dist.config.metrics import is_evaluation
from dpo_dist.foundation.errors import RunOutcome, warn_on_bug
from dpo_dist.foundation.signals import BY_TRACKER
from dpo_dist.objective.metrics import PairColumn, PairValues
from dpo_dist.training.evaluation.results import write_evaluation
from dpo_dist.training.reporting.metrics_log import MetricsLog, MetricsRow, log_position
from dpo_dist.training.reporting.protocols import Reporting
from dpo_dist.training.reporting.trackers import Trackers, open_trackers
from dpo_dist.training.reporting.wandb_run import TrackedRun
from dpo_dist.training.start.inputs import Inputs
from dpo_dist.training.start.open_run import Run


@dataclass(frozen=True)
class Recorder:
    """Records a run. A bug in what `reporting` adds gives a warning and does not end the run."""

    run: Run
    metrics: MetricsLog
    reporting: Reporting = field(default_factory=Reporting)
    trackers: Trackers = field(default_factory=Trackers)

    @classmethod
    def open(cls, run: Run, metrics: MetricsLog, reporting: Reporting) -> "Recorder":
        """Return the recorder of a training run, with its trackers, of which W&B may ask the run to stop."""
        ask = partial(run.stops.request.ask, BY_TRACKER)
        environment = json.loads(run.folder.environment.read_bytes())
        end = max(map(log_position, metrics.rows), default=-1.0)
        tracked = tracked_run(run, environment, ask, reporting.sent_samples(run.config))
        return cls(run, metrics, reporting, open_trackers(tracked, end, run.console))

    def row(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Record one metrics row, of an evaluation with the margins of its pairs."""
        evaluations = [earlier for earlier in self.metrics.rows if is_evaluation(earlier)]
        row = self.reporting.check_row(self.run, evaluations, row)
        self.metrics.append(row)
        self.trackers.log(row, margins)
        if self.reporting.on_row is not None and self.reporting.on_row(dict(row)):
            self.run.stops.request.ask("on_row")

    def evaluation(self, means: dict[str, float], values: PairValues, inputs: Inputs) -> None:
        """Write the files of the evaluation after the last step."""
        with warn_on_bug("the last evaluation's folder", self.run.warn):
            assert inputs.eval_set is not None, "evaluations have data"
            folder = self.run.folder
            write_evaluation(
                self.run, folder.last_evaluation, str(folder.model), means, values, inputs.eval_set
            )
            self.reporting.write_worst(self.run, inputs, values)

    def close(self, summary: Mapping[str, Any], outcome: RunOutcome) -> None:
        """Write the summary and the report, end tracking, and print how the run ended.

        `summary` is without `exit`.
        """
        rows = self.metrics.rows
        final_summary = {**summary, "exit": outcome.value}
        lines: list[str] = []
        with warn_on_bug("the verdict", self.run.warn):
            judgement, lines = self.reporting.closing_verdict(self.run.folder, rows, final_summary)
            final_summary |= judgement
        self.metrics.close(final_summary)
        lines += self.reporting.write_report(self.run, rows, final_summary)
        self.trackers.finish(outcome.value, final_summary)
        self.run.console.result("summary", {"run_dir": str(self.run.folder.path), **final_summary}, lines)


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
