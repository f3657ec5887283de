"""Record a run on rank 0: write metrics rows to files and trackers, and the report at the end."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from dpo_dist.config.identity import title
from dpo_dist.config.run_folder import LAST_EVALUATION
from dpo_dist.foundation.errors import RunOutcome, warn_on_bug
from dpo_dist.foundation.signals import BY_TRACKER
from dpo_dist.objective.metrics import PairColumn, PairValues
from dpo_dist.tools.evaluation.results import write_evaluation, write_worst
from dpo_dist.tools.pages.charts import draw_curves
from dpo_dist.tools.report.card import data_findings, run_card
from dpo_dist.tools.report.run import write_page
from dpo_dist.tools.report.samples import prepare_samples
from dpo_dist.tools.report.verdict import RUN_RULES, sample_alarm, verdict
from dpo_dist.tools.tables import closing_table
from dpo_dist.training.reporting.metrics_log import MetricsLog, MetricsRow, log_position
from dpo_dist.training.reporting.protocols import OnMoment, Reporting
from dpo_dist.training.reporting.trackers import Trackers, open_trackers
from dpo_dist.training.reporting.wandb_run import TrackedRun
from dpo_dist.training.start.inputs import Inputs
from dpo_dist.training.start.open_run import Run

OnRow = Callable[[MetricsRow], bool | None]
"""Called with each metrics row after it is recorded; if it returns true, the run stops."""


@dataclass(frozen=True)
class RunRecorder:
    """Metrics files, trackers and reports of one run; see `training.reporting.protocols`."""

    run: Run
    metrics: MetricsLog
    trackers: Trackers = field(default_factory=Trackers)
    on_row: OnRow | None = None

    def row(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Write a metrics row and send it to the trackers; warn if its samples look wrong."""
        alarm = None
        is_new = False
        if "eval_samples/prompts" in row:
            with warn_on_bug("the comparison of samples with earlier ones", self.run.warn):
                before = self.metrics.sample.evaluations
                alarm = sample_alarm([*before, row])
                is_new = sample_alarm(before) is None
            row = {**row, "eval_samples/alarms": float(alarm is not None)}
        self.metrics.append(row)
        self.trackers.log(row, margins)
        if alarm is not None and is_new:
            headline = RUN_RULES[alarm.rule].text
            self.run.warn(f"{headline} after step {row['step']:,.0f}: {alarm.with_remedy}")
        if self.on_row is not None and self.on_row(dict(row)):
            self.run.stops.request.ask("on_row")

    def evaluation(self, means: dict[str, float], values: PairValues, inputs: Inputs) -> None:
        """Write the files of the evaluation after the last step."""
        with warn_on_bug("the last evaluation's folder", self.run.warn):
            model = str(self.run.folder.model)
            dataset = inputs.eval_set
            assert dataset is not None, "evaluations have data"
            config = self.run.config
            folder = self.run.folder
            loss = self.run.config.loss
            reference = config.reference.path or config.model.path
            seed = config.trainer.seed
            write_evaluation(
                LAST_EVALUATION,
                model,
                means,
                values,
                dataset,
                run=folder,
                loss=loss,
                reference=reference,
                seed=seed,
            )
            if not loss.is_one_sided:
                file = folder.named_evaluation(LAST_EVALUATION).worst
                is_unpaired = loss.is_unpaired
                write_worst(file, values, dataset, inputs.tokenizer, is_unpaired=is_unpaired)

    def close(self, summary: Mapping[str, Any], outcome: RunOutcome) -> None:
        """Write summary, verdict, curves and page, end tracking, and print the closing table and verdict."""
        run = self.run
        rows = self.metrics.rows
        folder = self.run.folder
        final_summary = {**summary, "exit": outcome.value}
        lines: list[str] = []
        with warn_on_bug("the verdict", run.warn):
            run_verdict = verdict(rows, final_summary, data_findings(folder))
            final_summary["verdict"] = run_verdict.as_dict()
            lines = run_verdict.lines()
        self.metrics.close(final_summary)
        with warn_on_bug(folder.curves.name, run.warn):
            draw_curves(rows, folder.curves, folder.path.name)
        with warn_on_bug(folder.report.name, run.warn):
            write_page(folder, rows=rows)
        self.trackers.finish(outcome.value, final_summary)
        with warn_on_bug("the closing table", run.warn):
            lines = [*closing_table(folder, rows, final_summary), *lines]
        run.console.result("summary", {"run_dir": str(folder.path), **final_summary}, lines)

    def close_on_error(self) -> AbstractContextManager[None]:
        """Return a context that ends tracking within seconds if its block raises or is interrupted."""
        return self.trackers.finish_on_error()


def open_recorder(run: Run, metrics: MetricsLog, on_row: OnRow | None = None) -> RunRecorder:
    """Return the recorder of a training run, with its trackers; W&B may ask the run to stop."""
    ask = partial(run.stops.request.ask, BY_TRACKER)
    environment = json.loads(run.folder.environment.read_bytes())
    end = max(map(log_position, metrics.rows), default=-1.0)
    trackers = open_trackers(tracked_run(run, environment, ask), end, run.console)
    return RunRecorder(run, metrics, trackers, on_row)


def tracked_run(run: Run, environment: Mapping[str, Any], stop: Callable[[], None]) -> TrackedRun:
    """Return what trackers show of a run; they call `stop` if someone stops the run on their page."""
    config = run.config
    return TrackedRun(
        run.folder,
        config.tracking,
        title(config, run.folder.path),
        settings={**asdict(config), "environment": environment},
        # Texts of the data may go to a server only if the user asked for samples.
        max_samples=config.tracking.samples if config.samples.prompts else 0,
        stop=stop,
    )


def reporting(on_row: OnRow | None = None, on_moment: OnMoment | None = None) -> Reporting:
    """Return everything that reports on a run; `on_row` is called with each of its metrics rows."""
    open_one = partial(open_recorder, on_row=on_row)
    return Reporting(open_one, run_card, prepare_samples, write_page, on_moment)
