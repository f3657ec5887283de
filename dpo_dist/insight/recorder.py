"""Recorder of a run on rank 0: writes metrics rows to files and trackers, and the report at the end."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.foundation.errors import DpoDistError, first_line
from dpo_dist.insight.metrics.log import MetricsLog
from dpo_dist.insight.metrics.trackers import Margins, Trackers
from dpo_dist.insight.pages.charts import draw_curves
from dpo_dist.insight.pages.run import write_page
from dpo_dist.insight.verdict.rules import RULES, sample_alarm

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def spared(missing: str, say: Callable[[str], None]) -> Iterator[None]:
    """Turn a bug in the block into a warning that `missing` is missing: no report is worth a run.

    Errors of files and of users are raised: the same command continues once they are corrected.
    """
    try:
        yield
    except (OSError, DpoDistError):
        raise
    except Exception as bug:
        _log.exception("%s is missing", missing)
        say(f"warning: {missing} is missing because of a bug, see logs/rank-0.log: {first_line(bug)}")


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
            with spared("the comparison of samples with those before", self.say):
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
        with spared(folder.curves.name, self.say):
            draw_curves(self.metrics.rows, folder.curves, folder.path.name)
        with spared(folder.report.name, self.say):
            write_page(folder)
        self.trackers.finish(summary["exit"], summary)
