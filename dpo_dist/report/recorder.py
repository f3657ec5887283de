"""Recorder of a run on rank 0: writes metrics rows to files and trackers, and the report at the end."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dpo_dist.diagnostics.run_rules import RULES
from dpo_dist.diagnostics.verdict import sample_alarms
from dpo_dist.errors import first_line
from dpo_dist.report.histogram import Histogram
from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.plots import draw_curves
from dpo_dist.report.run_page.page import write_page
from dpo_dist.report.trackers import Trackers

T = TypeVar("T")

_log = logging.getLogger(__name__)

_SAMPLED = "eval_samples/prompts"


@dataclass(frozen=True)
class Recorder:
    """Metrics files and trackers of one run.

    Attributes:
        say: called with alarms about sampled responses, and with warnings.
    """

    metrics: MetricsLog
    trackers: Trackers
    say: Callable[[str], None]

    def record(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Write and send one metrics row; that of samples with the number of alarms about them.

        Args:
            row: the row.
            margins: of the pairs of its evaluation; only sent.
        """
        if _SAMPLED not in row:
            self._add(row, margins)
            return
        known = {alarm.rule for alarm in sample_alarms(self.metrics.rows)}
        alarms = sample_alarms([*self.metrics.rows, row])
        self._add({**row, "eval_samples/alarms": float(len(alarms))}, margins)
        for alarm in alarms:
            if alarm.rule not in known:
                headline = RULES[alarm.rule].headline
                self.say(f"warning: {headline} after step {row['step']:.0f}: {alarm.text}")
                self.trackers.alert(headline, alarm.text)

    def _add(self, row: Mapping[str, float], margins: Histogram | None) -> None:
        self.metrics.append(row)
        self.trackers.log(row, margins)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write summary, curves and report page, and finish tracking; `summary["exit"]` is the outcome."""
        self.metrics.save()
        self.metrics.write_summary(summary)
        folder = self.metrics.folder
        rows, name = self.metrics.rows, folder.path.name
        self.described(lambda: draw_curves(rows, folder.curves, name), folder.curves.name)
        self.described(lambda: write_page(folder), folder.report.name)
        self.trackers.finish(summary["exit"], summary)

    def described(self, write: Callable[[], T], name: str) -> T | None:
        """Return the result of `write`, or None after a warning: a description must not end the run.

        Args:
            write: makes the description.
            name: of its file, for the warning.

        Raises:
            OSError: a file cannot be written.
        """
        try:
            return write()
        except OSError:
            raise
        except Exception as error:
            _log.warning("%s cannot be written", name, exc_info=True)
            self.say(f"warning: {name} cannot be written: {type(error).__name__}: {first_line(error)}")
            return None
