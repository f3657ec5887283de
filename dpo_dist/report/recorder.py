"""Where every row of a run goes: the metrics files and the tracker; on rank 0 only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.page import write_page
from dpo_dist.report.plots import draw_curves
from dpo_dist.report.tracking import Tracker


@dataclass(frozen=True)
class Recorder:
    """The files and the tracker of one run, kept in step."""

    metrics: MetricsLog
    tracker: Tracker

    def record(self, row: Mapping[str, float]) -> None:
        """Keep and send one row of log_history.json."""
        self.metrics.append(row)
        self.tracker.log(row)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write all that people look at afterwards; `summary["exit"]` says how the run ended."""
        self.metrics.save()
        self.metrics.write_summary(summary)
        folder = self.metrics.folder
        draw_curves(self.metrics.rows, folder.curves, folder.path.name)
        write_page(folder.path)
        self.tracker.finish(summary["exit"], summary)
