"""Send each metrics row once to each tracker, over all starts of a run; no tracker stops or slows the run."""

import contextlib
import json
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from transformers.utils import flatten_dict

from dpo_dist.config.metrics import METRICS, PREFIX
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import DEFAULT_PROJECT, TrackerName
from dpo_dist.foundation import files
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import RunOutcome, StoppedError, first_line
from dpo_dist.foundation.text import pluralize, without_secrets
from dpo_dist.foundation.types import Fields
from dpo_dist.objective.metrics import PairColumn
from dpo_dist.training.reporting.metrics_log import MetricsRow, log_position, stored_rows
from dpo_dist.training.reporting.wandb_run import (
    TrackedRun,
    WandbRun,
    end_service,
    open_wandb,
    upload_command,
    wandb_name,
    wanted_mode,
)

_OPEN_SECONDS = 10.0
_FINISH_SECONDS = 30.0
_FINISH_ON_ERROR_SECONDS = 4.0
_KILL_SECONDS = 2.0
_VARIABLES = {
    "SWANLAB_INTERACTIVE": "false",  # it would ask for a key
    "SWANLAB_PROBE_RUNTIME": "false",  # the command line, which may have secrets
    "SWANLAB_TERMINAL_PROXY_TYPE": "none",
}
"""Variables that keep packages from asking, and from sending what nobody asked for."""
_RUN_IDS = {
    TrackerName.mlflow: ("info.run_id", "run_id"),
    TrackerName.trackio: ("name", "name"),
    TrackerName.swanlab: ("id", "id"),
}
"""Where a tracker's run has its id, and the option of accelerate's class that continues this run."""
_ABOVE = re.compile(rf"^({'|'.join(map(re.escape, METRICS))})/")
"""A metric's name at the beginning of another one."""


def plain_name(key: str) -> str:
    """Return a metric's name for trackers: as in W&B, but so that it can be a file beside those of others.

    `rewards/margins/a` beside `rewards/margins` is `train/rewards/margins.a`.
    """
    name = _ABOVE.sub(r"\1.", key.removeprefix(PREFIX))
    return re.sub(r"[^\w./ :-]", "_", wandb_name(PREFIX * key.startswith(PREFIX) + name))


class AccelerateRun:
    """The run of another tracker than W&B, by accelerate's class; methods raise the tracker's errors.

    Sends those rows of earlier starts, up to the position `end`, that the tracker does not have.
    """

    def __init__(self, name: TrackerName, tracked: TrackedRun, end: float):
        for variable, value in _VARIABLES.items():
            os.environ.setdefault(variable, value)
        self._name = name
        self._note = tracked.folder.trackers / f"{name}.json"
        note = json.loads(self._note.read_bytes()) if self._note.exists() else {}
        self._id = note.get("id")
        self._received = note.get("sent", -1.0)
        project, title = without_secrets([tracked.tracking.project or DEFAULT_PROJECT, tracked.title])
        first, options = self._options(tracked.folder, project, title)
        self._tracker = LOGGER_TYPE_TO_CLASS[name](first, **options)
        self._tracker.start()
        if name in _RUN_IDS:
            self._id = str(attrgetter(_RUN_IDS[name][0])(self._tracker.tracker))
        # TensorBoard would show settings as a second run, MLflow refuses to change them.
        if name is not TrackerName.tensorboard and not (note and name is TrackerName.mlflow):
            settings = flatten_dict(without_secrets(tracked.settings))
            plain = {
                key: value if isinstance(value, int | float) else str(value)
                for key, value in settings.items()
            }
            self._tracker.store_init_configuration(plain)
        self._write_note()
        for row in stored_rows(tracked.folder, end):
            self.log(row)

    def log(self, row: MetricsRow, margins: PairColumn | None = None) -> None:  # noqa: ARG002
        """Send a row, unless the tracker has it because a resumed run computed the step again."""
        if log_position(row) <= self._received:
            return
        values = {plain_name(key): float(value) for key, value in row.items() if key != "step"}
        self._tracker.log(values, step=int(row["step"]))
        self._received = log_position(row)
        self._write_note()

    def finish(self, outcome: str, summary: Fields) -> None:  # noqa: ARG002
        """Close the run."""
        self._tracker.finish()

    def _write_note(self) -> None:
        files.write_text(self._note, json.dumps({"id": self._id, "sent": self._received}))

    def _options(self, folder: RunFolder, project: str, title: str) -> tuple[str, dict[str, Any]]:
        """Return the first argument of accelerate's class, for most the project, and its options."""
        first = project
        options = dict[str, Any]()
        match self._name:
            case TrackerName.tensorboard:
                first = folder.tensorboard.name
                place = str(folder.tensorboard.parent)
                options = {"logging_dir": place, "purge_step": int(self._received) + 1}
            case TrackerName.mlflow:
                options = {"run_name": title}
            case TrackerName.trackio | TrackerName.swanlab:
                options = {"name": title}
                if self._id:
                    options["resume"] = "allow"
        if self._id:
            options[_RUN_IDS[self._name][1]] = self._id
        return first, options


OpenRun = WandbRun | AccelerateRun
Call = Callable[[OpenRun], None]


class InBackground:
    """Sends rows to one tracker in a thread, because its calls can wait, fail and hang.

    `start` opens the run. A row that cannot be sent is tried again before the next one, and at the end.
    """

    def __init__(self, name: str, start: Callable[[], OpenRun | None], console: Console, folder: RunFolder):
        self._name = name
        self._console = console
        self._folder = folder
        self._run: OpenRun | None = None
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._end: Call  # of `finish`
        self._logged = 0
        self._sent = 0
        self._is_late = False
        self.is_open = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()

    def log(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Queue one metrics row; rows are sent in order."""
        self._logged += 1
        self._calls.put(lambda run: run.log(row, margins))

    def finish(self, outcome: str, summary: Fields) -> None:
        """Queue the end of the run."""
        self._end = lambda run: run.finish(outcome, summary)
        self._calls.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for the end, at most about `seconds`, and say which rows are lost."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._is_late = True
            advice = ""
            if self._name == TrackerName.wandb:
                advice = f"; to upload the run: {upload_command(self._folder)}"
                if isinstance(self._run, WandbRun):
                    self._run.is_over = True
                end_service(kills=True)
                self._thread.join(_KILL_SECONDS)
            self._console.warn(f"{self._name} has not finished in time and is stopped{advice}")
        lost = self._logged - self._sent
        if lost:
            rows = f"{lost:,} of the {pluralize(self._logged, 'row')} of this start"
            self._console.warn(f"{rows} were not sent to {self._name}; {self._folder.log_history} has all")

    def _work(self, start: Callable[[], OpenRun | None]) -> None:
        with self._warns("cannot start, training continues without it"):
            self._run = start()
        self.is_open.set()
        run = self._run
        if run is None:
            return
        waiting = deque[Call]()
        failure = "fails, training continues, its rows wait"
        for call in iter(self._calls.get, None):
            waiting.append(call)
            with self._warns(failure):
                while waiting:
                    waiting[0](run)
                    waiting.popleft()
                    self._sent += 1
            if waiting:  # is said once
                failure = ""
        for call in waiting:
            with self._warns(""):
                call(run)
                self._sent += 1
        with self._warns("has not closed its run"):
            self._end(run)

    @contextlib.contextmanager
    def _warns(self, failure: str) -> Iterator[None]:
        """Turn an error of the block into a warning with the words of `failure`, if there are any."""
        try:
            yield
        except (Exception, SystemExit) as error:  # some packages exit
            if failure and not self._is_late:
                self._console.warn(f"{self._name} {failure}: {first_line(error)}")


class Trackers:
    """All trackers of a run; empty if tracking is off."""

    def __init__(self, trackers: Sequence[InBackground] = ()):
        self._trackers = trackers

    def log(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Send one metrics row, of an evaluation with its margins, without waiting for a server."""
        for tracker in self._trackers:
            tracker.log(row, margins)

    def finish(self, outcome: str, summary: Fields, seconds: float = _FINISH_SECONDS) -> None:
        """Close all trackers at the same time; waits about `seconds`."""
        end = time.monotonic() + seconds
        for tracker in self._trackers:
            tracker.finish(outcome, summary)
        for tracker in self._trackers:
            tracker.wait(max(end - time.monotonic(), 0.0))

    @contextlib.contextmanager
    def finish_on_error(self) -> Iterator[None]:
        """If the block raises or is interrupted, close all trackers within seconds, with all rows so far."""
        try:
            yield
        except BaseException as error:
            is_stop = isinstance(error, StoppedError)
            self.finish(RunOutcome.preempted if is_stop else "failed", {}, _FINISH_ON_ERROR_SECONDS)
            raise


def open_trackers(tracked: TrackedRun, end: float, console: Console) -> Trackers:
    """Start or resume a run's trackers at the same time, without waiting for a slow server.

    `end`: the position of the last row before the checkpoint from which training resumes; -1 for a new run.
    Other threads also print to `console`.
    """
    trackers: list[InBackground] = []
    for name in dict.fromkeys(tracked.tracking.to):
        start: Callable[[], OpenRun | None] = partial(AccelerateRun, name, tracked, end)
        if name is TrackerName.wandb:
            if wanted_mode() is None:
                continue
            start = partial(open_wandb, tracked, end, console)
        trackers.append(InBackground(name, start, console, tracked.folder))
    until = time.monotonic() + _OPEN_SECONDS
    for tracker in trackers:  # so that the messages of a fast start come in order
        tracker.is_open.wait(max(until - time.monotonic(), 0.0))
    return Trackers(trackers)
