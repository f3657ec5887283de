"""Weights & Biases, on rank 0 only.

Tracking never stops a run and never prompts for a login. An exception of wandb becomes one warning; then
tracking is off and training continues.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.tracking_schema import WandbMode
from dpo_dist.errors import first_line
from dpo_dist.report.trackers.histogram import Histogram
from dpo_dist.report.trackers.tracked_values import order_of
from dpo_dist.report.trackers.wandb_environment import notes_of, wanted_mode, warn_of_unused
from dpo_dist.report.trackers.wandb_media import RunMedia
from dpo_dist.report.trackers.wandb_session import Mode, Session, address, close, set_up, start_run, tear_down

if TYPE_CHECKING:
    import wandb

_log = logging.getLogger(__name__)


def _silent(_text: str) -> None:
    """Print nothing."""


class Tracker:
    """One wandb run, or none.

    Args:
        start: starts or resumes the run; None: no tracking.
        media: tables, histograms and artifacts of the run.
        rows: metrics rows of earlier starts; those that wandb does not have are sent.
        notes: of the user, shown on the run's page before the verdict.
        say: called with what a user should know.
    """

    def __init__(
        self,
        start: Callable[[], Session] | None,
        media: RunMedia,
        rows: Sequence[Mapping[str, float]] = (),
        notes: str | None = None,
        say: Callable[[str], None] = _silent,
    ):
        self._session = start() if start else None
        self._restart = start
        self._say = say
        self._media = media
        self._notes = notes
        self._rows = list(rows)
        self._has_row = False  # wandb had the last row before it was logged here
        known = rows[-1]["step"] if rows else 0
        if self._session is not None and self._session.received.step > known:
            say(f"wandb has the rows up to step {self._session.received.step}; they are not sent again")
        self._act(self._send)

    @property
    def run(self) -> "wandb.Run | None":
        """The wandb run; None if tracking is off, has failed or is finished."""
        return self._session.run if self._session else None

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send one metrics row under the names of `wandb_names`, unless wandb has a row of this step.

        Args:
            row: the row.
            margins: of the pairs of its evaluation.
        """
        if self._session is not None:
            self._has_row = order_of(row) <= self._session.received
            if margins is not None:
                self._media.margins[len(self._rows)] = margins
            self._rows.append(row)
        self._act(self._send)

    def system(self, values: Mapping[str, float]) -> None:
        """Send system metrics of ranks into W&B's own, which have the time as their axis, not the step."""
        self._act(lambda session: session.send_system(values))

    def hurry(self) -> None:
        """Send neither tables nor artifacts from now on."""
        self._media.is_wanted = False

    def alert(self, title: str, text: str) -> None:
        """Raise an alert of wandb, which it shows and can send to its user by mail.

        None about a row that an earlier start sent: that start raised it.
        """
        if not self._has_row:
            self._act(lambda session: session.run.alert(title=title, text=text))

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close the run. Data that cannot be uploaded in time stay in the run directory, with a warning.

        Args:
            outcome: `completed`, `preempted`, `diverged` or `failed`.
            summary: as in `summary.json`.
        """

        def end(session: Session) -> None:
            log_files = functools.partial(self._media.log_artifacts, session.run, summary)
            warn = functools.partial(_warn, say=self._say)
            session.growth.note_sent()
            close(session.run, outcome, summary, self._rows, self._notes, warn, log_files)

        self._act(end)
        session, self._session = self._session, None
        if session is not None and tear_down():
            self._warn_of(session.growth.fault(is_closed=True))

    def _send(self, session: Session) -> None:
        session.send(self._rows, self._media.of_row)

    def _act(self, action: Callable[[Session], None]) -> None:
        if self._session is None:
            return
        try:
            try:
                action(self._session)
                self._warn_of(self._session.growth.fault())
            except ConnectionError:
                # The signal of a preemption also kills wandb's service, which is a process of its own, while
                # rows are still to be sent.
                tear_down(is_dead=True)
                if self._restart is None:
                    raise
                self._session, self._restart = self._restart(), None
                self._send(self._session)
                action(self._session)
        except Exception as error:
            _warn(f"wandb tracking stops, training continues: {first_line(error)}", self._say)
            self._session = None
            tear_down()

    def _warn_of(self, fault: str | None) -> None:
        if fault is not None:
            _warn(f"{fault}; training continues, {self._media.folder.log_history} has all rows", self._say)


def open_tracker(
    config: RunConfig,
    folder: RunFolder,
    request_stop: Callable[[], None],
    *,
    rows: Sequence[Mapping[str, float]] = (),
    environment: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = _silent,
    init_seconds: float = 60.0,
    finish_seconds: float = 20.0,
) -> Tracker:
    """Start or resume the wandb run of a run directory; never raises, never prompts.

    The wandb run's id is stored in the directory, so that a resumed job continues the same wandb run. With
    `tracking.wandb=auto` the environment variable WANDB_MODE is used if set; otherwise the run is online if
    wandb finds a key. If wandb cannot go online, the run is stored in the directory for a later upload.

    Args:
        config: logged completely, without secrets.
        folder: the run directory.
        request_stop: called from another thread if someone stops the run on its web page.
        rows: metrics rows up to the checkpoint that training resumes from.
        environment: content of `environment.json`, logged beside `config`.
        say: called with the address of the run, and with the reason if it is not online.
        init_seconds: timeout for the server at the start.
        finish_seconds: timeout for uploads at the end; a preempted job has little time.
    """
    wanted = wanted_mode(config)
    if config.tracking.wandb is not WandbMode.off:
        warn_of_unused(config, functools.partial(_warn, say=say))
    settings = {"init_timeout": init_seconds, "finish_timeout": finish_seconds, "stop_fn": request_stop}
    for mode in _modes_to_try(wanted, say):
        try:
            start = functools.partial(start_run, config, folder, mode, environment, settings)
            media = RunMedia(folder, config.tracking.samples)
            tracker = Tracker(start, media, rows, notes_of(config.tracking), say)
        except Exception as error:
            _warn(f"wandb cannot start {mode}: {first_line(error)}", say)
            tear_down()
            continue
        if tracker.run is not None:
            say(f"wandb: {address(tracker.run, mode, folder)}")
        return tracker
    return Tracker(None, RunMedia(folder, 0))


def _warn(text: str, say: Callable[[str], None]) -> None:
    _log.warning(text)
    say(f"warning: {text}")


def _modes_to_try(wanted: WandbMode, say: Callable[[str], None]) -> list[Mode]:
    if wanted is WandbMode.off:
        return []
    if wanted is WandbMode.offline:
        return ["offline"]
    try:
        has_key = set_up("online").login(prompt=False, verify=False)
    except Exception as error:
        _warn(f"wandb cannot log in: {first_line(error)}", say)
        has_key = False
    if has_key:
        return ["online", "offline"]
    if wanted is WandbMode.online:
        _warn("wandb has no usable key, the run is tracked offline; `wandb login` stores a key", say)
    return ["offline"]
