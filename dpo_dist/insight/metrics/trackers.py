"""TensorBoard and MLflow, by accelerate's trackers; only rank 0 opens them."""

import contextlib
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import MLflowTracker, TensorBoardTracker

from dpo_dist.config.identity import settings, title
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import DEFAULT_PROJECT, OtherTracker, RunConfig, WandbMode
from dpo_dist.distributed.world import World
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import RunOutcome, StoppedError, first_line
from dpo_dist.foundation.text import without_secrets
from dpo_dist.insight.metrics.names import (
    Histogram,
    RowOrder,
    order_of,
    order_of_sent,
    wandb_names,
)
from dpo_dist.insight.metrics.system import system_metrics
from dpo_dist.insight.metrics.wandb import (
    kill_services,
    open_tracker,
    services,
    staged_in,
    upload_command,
    wanted_mode,
)


def open_tensorboard(folder: Path, first_step: int) -> Any:
    """Return a tracker that writes event files.

    Args:
        folder: of the event files of all starts of a run.
        first_step: TensorBoard drops events of earlier starts from this step on.
    """
    tracker = TensorBoardTracker(folder.name, folder.parent, purge_step=first_step)
    tracker.start()
    return tracker


def open_mlflow(project: str, name: str, run_id: str | None, folder: Path) -> Any:
    """Return a tracker of a run of MLflow, at MLFLOW_TRACKING_URI or in a database in `folder`.

    Its `tracker` is MLflow's run, with the last value of every metric that earlier starts logged.

    Args:
        project: the experiment.
        name: of the run.
        run_id: of the run that is continued; None: a new one.
        folder: for the database.
    """
    import mlflow  # noqa: PLC0415 (an optional package)

    if not mlflow.is_tracking_uri_set():
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    tracker = MLflowTracker(project, run_id=run_id, run_name=name)
    tracker.start()
    return tracker


_log = logging.getLogger(__name__)


class RowTracker(Protocol):
    """A program that shows metrics rows. Calls come from one thread, except `hurry`."""

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send one metrics row, and the margins of its evaluation."""

    def system(self, values: Mapping[str, float]) -> None:
        """Send system metrics of ranks, by name and rank."""

    def alert(self, title: str, text: str) -> None:
        """Show an alarm."""

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Send the summary and close the run."""

    def hurry(self) -> None:
        """Send nothing but rows and the summary from now on: the time of the end is short."""


class InBackground:
    """A tracker that is opened and called in a thread of its own; no method but `finish` waits.

    Args:
        name: for messages.
        start: opens the tracker; takes a function for what a user should know.
        say: called, also from the thread, with that, and with the reason if the tracker fails.
        remedy: advice if the tracker has to be ended.
        abandon: ends a call of the tracker that does not return.
        first_wait: seconds to wait for `start`, so that its messages come in order if it is fast.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[Callable[[str], None]], RowTracker],
        say: Callable[[str], None],
        remedy: str = "",
        abandon: Callable[[], None] = lambda: None,
        first_wait: float = 0.0,
    ):
        self._name, self._tell, self._remedy, self._abandon = name, say, remedy, abandon
        self._is_abandoned = False
        self._tracker: RowTracker | None = None
        self._actions: queue.SimpleQueue[Callable[[RowTracker], None] | None] = queue.SimpleQueue()
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()
        self._is_open.wait(first_wait)

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send one metrics row later, in order."""
        self._do(lambda tracker: tracker.log(row, margins))

    def system(self, values: Mapping[str, float]) -> None:
        """Send system metrics of ranks later, in order."""
        self._do(lambda tracker: tracker.system(values))

    def alert(self, title: str, text: str) -> None:
        """Show an alarm later, in order."""
        self._do(lambda tracker: tracker.alert(title, text))

    def hurry(self) -> None:
        """Send nothing but rows and the summary from now on."""
        if self._tracker is not None:
            self._tracker.hurry()

    def finish(self, outcome: str, summary: Mapping[str, Any], seconds: float) -> None:
        """Close the run; return after about `seconds` even if a call does not return."""
        self._actions.put(lambda tracker: tracker.finish(outcome, summary))
        self._actions.put(None)
        deadline = time.monotonic() + seconds
        self._thread.join(seconds / 2)
        if self._thread.is_alive():
            self.hurry()
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if not self._thread.is_alive():
            return
        self._warn(f"{self._name} has not finished after {seconds:.0f} s and is ended{self._remedy}")
        self._is_abandoned = True
        with contextlib.suppress(Exception):
            self._abandon()
        self._thread.join(_LAST_SECONDS)

    def _do(self, action: Callable[[RowTracker], None]) -> None:
        if self._thread.is_alive():
            self._actions.put(action)

    def _work(self, start: Callable[[Callable[[str], None]], RowTracker]) -> None:
        try:
            self._tracker = start(self._say)
            self._is_open.set()
            while (action := self._actions.get()) is not None:
                action(self._tracker)
        except Exception as error:
            self._warn(f"{self._name} tracking stops, training continues: {first_line(error)}")
        finally:
            self._is_open.set()

    def _say(self, text: str) -> None:
        if not self._is_abandoned:
            self._tell(text)

    def _warn(self, text: str) -> None:
        _log.warning(text)
        self._say(f"warning: {text}")


_LAST_SECONDS = 2.0


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

    last = order_of(rows[-1]) if rows and any(folder.tensorboard.glob("events.*")) else RowOrder()
    tracker = open_tensorboard(folder.tensorboard, int(last.step) + 1)
    if not rows:
        lines = [f"    {name}: {value}" for name, value in without_secrets(settings(config)).items()]
        tracker.tracker.add_text("settings", "\n".join(lines))
    return AccelerateTracker(tracker, last, rows)


def _mlflow(config: RunConfig, folder: RunFolder, rows: Sequence[Row]) -> AccelerateTracker:

    path = folder.mlflow_id
    run_id = path.read_text(encoding="utf-8").strip() if path.exists() else None
    project = config.tracking.project or DEFAULT_PROJECT
    name = without_secrets(title(config, folder.path))
    tracker = open_mlflow(project, name, run_id, path.parent)
    if run_id is None:
        files.write_text(path, str(tracker.tracker.info.run_id))
        tracker.store_init_configuration(without_secrets(settings(config)))
    received = order_of_sent(tracker.tracker.data.metrics)
    return AccelerateTracker(tracker, received, rows, lambda name: _NOT_IN_MLFLOW.sub("_", name))


_FIRST_WAIT_SECONDS = 10.0
_FINISH_SECONDS = 30.0
_ERROR_SECONDS = 4.0


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run; none if tracking is off."""

    open: tuple[InBackground, ...] = ()
    finish_seconds: float = _FINISH_SECONDS
    until_closed: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send one metrics row, and the margins of its evaluation; does not wait."""
        for tracker in self.open:
            tracker.log(row, margins)

    def system(self, values: Mapping[str, float]) -> None:
        """Send system metrics of ranks, by name and rank; does not wait."""
        for tracker in self.open:
            tracker.system(values)

    def alert(self, title: str, text: str) -> None:
        """Show an alarm; does not wait."""
        for tracker in self.open:
            tracker.alert(title, text)

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close all; waits at most `finish_seconds` for each."""
        for tracker in self.open:
            tracker.finish(outcome, summary, self.finish_seconds)
        self.until_closed.close()

    @contextlib.contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """If the block ends in error or is interrupted, close all in a few seconds, with all rows so far."""
        try:
            yield
        except BaseException as error:
            outcome = RunOutcome.preempted if isinstance(error, StoppedError) else "failed"
            for tracker in self.open:
                tracker.hurry()
                tracker.finish(outcome, {}, _ERROR_SECONDS)
            self.until_closed.close()
            raise


def sampled_system(
    config: RunConfig, world: World, trackers: Trackers | None
) -> contextlib.AbstractContextManager[None]:
    """Return a block in which this rank samples its system metrics for W&B, if that is on; not collective."""
    if wanted_mode(config) is WandbMode.off:
        return contextlib.nullcontext()
    send = None if trackers is None else trackers.system
    return system_metrics(RunFolder.of(config).system_metrics, world, send)


def open_trackers(
    config: RunConfig,
    folder: RunFolder,
    request_stop: Callable[[], None],
    *,
    rows: Sequence[Mapping[str, float]],
    environment: Mapping[str, Any],
    say: Callable[[str], None],
) -> Trackers:
    """Start or resume the trackers of a run; never raises, and does not wait for a server that is slow.

    Args:
        config: of the run.
        folder: the run directory.
        request_stop: called from another thread if someone stops the run on its W&B page.
        rows: metrics rows up to the checkpoint that training resumes from.
        environment: content of `environment.json`.
        say: called, also from other threads, with what a user should know.
    """
    trackers, until_closed = [], contextlib.ExitStack()
    if config.tracking.wandb is not WandbMode.off:
        remedy = f"; later: {upload_command(folder)}"

        def start(say: Callable[[str], None]) -> RowTracker:
            return open_tracker(
                config, folder, request_stop, rows=list(rows), environment=environment, say=say
            )

        until_closed.enter_context(staged_in(folder))
        abandon = partial(kill_services, services())
        trackers.append(InBackground("wandb", start, say, remedy, abandon, _FIRST_WAIT_SECONDS))
    for kind in config.tracking.also:
        trackers.append(InBackground(kind.value, start_of(kind, config, folder, list(rows)), say))
    return Trackers(tuple(trackers), until_closed=until_closed)
