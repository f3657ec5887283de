"""TensorBoard and MLflow: the rows of a run once each, over all its starts."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_dist import atomic
from dpo_dist.config.identity import settings, title
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.tracking_schema import DEFAULT_PROJECT, OtherTracker
from dpo_dist.report.trackers.histogram import Histogram
from dpo_dist.report.trackers.tracked_values import (
    RowOrder,
    order_of,
    order_of_sent,
    wandb_names,
)
from dpo_dist.secret_text import without_secrets

Row = Mapping[str, float]

_NOT_IN_MLFLOW = re.compile(r"[^\w./ -]")


class AccelerateTracker:
    """A tracker of accelerate that gets the rows it does not have.

    Args:
        tracker: logs and finishes.
        received: place of the last row that it has.
        rows: of earlier starts.
        named: returns the name of a metric in a form that the tracker accepts.
    """

    def __init__(
        self, tracker: Any, received: RowOrder, rows: Sequence[Row], named: Callable[[str], str] = str
    ):
        self._tracker, self._received, self._named = tracker, received, named
        for row in rows:
            self.log(row)

    def log(self, row: Row, margins: Histogram | None = None) -> None:
        """Send a row under its names in W&B; a histogram is not sent."""
        del margins
        if order_of(row) > self._received:
            values = {self._named(name): value for name, value in wandb_names(row).items()}
            self._tracker.log(values, step=int(row["step"]))
            self._received = order_of(row)

    def system(self, values: Mapping[str, float]) -> None:
        """Nothing: only W&B gets system metrics."""

    def alert(self, title: str, text: str) -> None:
        """Nothing: these trackers have no alarms."""

    def hurry(self) -> None:
        """Nothing: there are only rows."""

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close the run."""
        del outcome, summary
        self._tracker.finish()


def start_of(
    kind: OtherTracker, config: RunConfig, folder: RunFolder, rows: Sequence[Row]
) -> Callable[[Callable[[str], None]], AccelerateTracker]:
    """Return a function that starts or resumes a tracker.

    Args:
        kind: of the tracker.
        config: of the run.
        folder: the run directory.
        rows: metrics rows up to the checkpoint that training resumes from.
    """
    match kind:
        case OtherTracker.tensorboard:
            return lambda _say: _tensorboard(config, folder, rows)
        case OtherTracker.mlflow:
            return lambda _say: _mlflow(config, folder, rows)


def _tensorboard(config: RunConfig, folder: RunFolder, rows: Sequence[Row]) -> AccelerateTracker:
    from dpo_dist.distributed.trackers import open_tensorboard  # noqa: PLC0415 (imports accelerate)

    last = order_of(rows[-1]) if rows and any(folder.tensorboard.glob("events.*")) else RowOrder()
    tracker = open_tensorboard(folder.tensorboard, int(last.step) + 1)
    if not rows:
        lines = [f"    {name}: {value}" for name, value in without_secrets(settings(config)).items()]
        tracker.tracker.add_text("settings", "\n".join(lines))
    return AccelerateTracker(tracker, last, rows)


def _mlflow(config: RunConfig, folder: RunFolder, rows: Sequence[Row]) -> AccelerateTracker:
    from dpo_dist.distributed.trackers import open_mlflow  # noqa: PLC0415 (imports accelerate)

    path = folder.mlflow_id
    run_id = path.read_text(encoding="utf-8").strip() if path.exists() else None
    project = config.tracking.project or DEFAULT_PROJECT
    name = without_secrets(title(config, folder.path))
    tracker = open_mlflow(project, name, run_id, path.parent)
    if run_id is None:
        atomic.write_text(path, str(tracker.tracker.info.run_id))
        tracker.store_init_configuration(without_secrets(settings(config)))
    received = order_of_sent(tracker.tracker.data.metrics)
    return AccelerateTracker(tracker, received, rows, lambda name: _NOT_IN_MLFLOW.sub("_", name))
