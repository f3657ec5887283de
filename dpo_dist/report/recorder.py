"""Recorder of a run on rank 0: writes metrics rows to files and trackers, and the report at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.report.histogram import Histogram
from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.plots import draw_curves
from dpo_dist.report.run_page.page import write_page
from dpo_dist.report.trackers import Trackers


@dataclass(frozen=True)
class Recorder:
    """Metrics files and trackers of one run."""

    metrics: MetricsLog
    trackers: Trackers

    def record(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Write and send one metrics row; the margins of its evaluation are only sent."""
        self.metrics.append(row)
        self.trackers.log(row, margins)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write summary, curves and report page, and finish tracking; `summary["exit"]` is the outcome."""
        self.metrics.save()
        self.metrics.write_summary(summary)
        folder = self.metrics.folder
        draw_curves(self.metrics.rows, folder.curves, folder.path.name)
        write_page(folder)
        self.trackers.finish(summary["exit"], summary)
