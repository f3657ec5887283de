"""Recorder of a run on rank 0: writes metrics rows to files and trackers, and the report at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.foundation.errors import warn_on_bug
from dpo_dist.insight.metrics.log import MetricsLog
from dpo_dist.insight.metrics.trackers import Margins, Trackers
from dpo_dist.insight.pages.charts import draw_curves
from dpo_dist.insight.pages.run import write_page
from dpo_dist.insight.verdict.rules import RULES, sample_alarm


@dataclass(frozen=True)
class Recorder:
    """Metrics files and trackers of one run; `say` gets alarms about sampled responses."""

    metrics: MetricsLog
    trackers: Trackers
    say: Callable[[str], None]

    def record(self, row: Mapping[str, float], margins: Margins | None = None) -> None:
        """Write and send one metrics row; that of samples with whether they are a fault."""
        alarm, is_new = None, False
        if "eval_samples/prompts" in row:
            with warn_on_bug("the comparison of samples with those before", self.say):
                alarm = sample_alarm([*self.metrics.rows, row])
                is_new = sample_alarm(self.metrics.rows) is None
            row = {**row, "eval_samples/alarms": float(alarm is not None)}
        self.metrics.append(row)
        self.trackers.log(row, margins)
        if alarm is not None and is_new:
            headline = RULES[alarm.rule].text
            self.say(f"warning: {headline} after step {row['step']:,.0f}: {alarm.with_remedy}")

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write summary, curves and report page, and finish tracking; `summary["exit"]` is the outcome."""
        self.metrics.save(summary)
        folder = self.metrics.folder
        with warn_on_bug(folder.curves.name, self.say):
            draw_curves(self.metrics.rows, folder.curves, folder.path.name)
        with warn_on_bug(folder.report.name, self.say):
            write_page(folder)
        self.trackers.finish(summary["exit"], summary)
