"""Recorder of a run on rank 0: writes metrics rows to files and tracker, and the report at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.diagnostics.run_rules import RULES
from dpo_dist.diagnostics.verdict import sample_alarms
from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.plots import draw_curves
from dpo_dist.report.run_page.page import write_page
from dpo_dist.report.tracking import Tracker

_SAMPLED = "eval_samples/prompts"


@dataclass(frozen=True)
class Recorder:
    """Metrics files and tracker of one run.

    Attributes:
        say: called with alarms about sampled responses.
    """

    metrics: MetricsLog
    tracker: Tracker
    say: Callable[[str], None]

    def record(self, row: Mapping[str, float]) -> None:
        """Write and send one metrics row; that of samples with the number of alarms about them."""
        if _SAMPLED not in row:
            self._add(row)
            return
        known = {alarm.rule for alarm in sample_alarms(self.metrics.rows)}
        alarms = sample_alarms([*self.metrics.rows, row])
        self._add({**row, "eval_samples/alarms": float(len(alarms))})
        for alarm in alarms:
            if alarm.rule not in known:
                headline = RULES[alarm.rule].headline
                self.say(f"warning: {headline} after step {row['step']:.0f}: {alarm.text}")
                self.tracker.alert(headline, alarm.text)

    def _add(self, row: Mapping[str, float]) -> None:
        self.metrics.append(row)
        self.tracker.log(row)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write summary, curves and report page, and finish tracking; `summary["exit"]` is the outcome."""
        self.metrics.save()
        self.metrics.write_summary(summary)
        folder = self.metrics.folder
        draw_curves(self.metrics.rows, folder.curves, folder.path.name)
        write_page(folder)
        self.tracker.finish(summary["exit"], summary)
