"""Weights & Biases, on rank 0 only."""

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from dpo_dist.config.identity import title
from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.config.schema import DEFAULT_PROJECT, RunConfig, TrackingConfig, WandbMode
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import ExitCode, RunOutcome, first_line
from dpo_dist.foundation.text import without_secrets
from dpo_dist.insight.metrics.names import (
    EVALUATED_AT,
    MARGINS,
    SAMPLES,
    STEP_AXIS,
    Histogram,
    RowOrder,
    last_and_best,
    order_of,
    order_of_sent,
    wandb_names,
)
from dpo_dist.insight.metrics.system import FileGrowth
from dpo_dist.insight.pages.render import json_rows

if TYPE_CHECKING:
    import wandb


_MODES = {
    "online": WandbMode.online,
    "run": WandbMode.online,
    "offline": WandbMode.offline,
    "dryrun": WandbMode.offline,
    "disabled": WandbMode.off,
}
"""Values of WANDB_MODE, the older two too."""


def wanted_mode(config: RunConfig) -> WandbMode:
    """Return `tracking.wandb`; if it is `auto`, the mode of WANDB_MODE if that is set."""
    wanted = config.tracking.wandb
    return _MODES.get(_value("WANDB_MODE"), wanted) if wanted is WandbMode.auto else wanted


def run_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """Return arguments of `wandb.init`; wandb reads the variable of an argument that is None.

    Args:
        config: of the run.
        name: of the run, unless WANDB_NAME is set.
    """
    tracking = config.tracking
    return {
        "project": tracking.project or _value("WANDB_PROJECT") or DEFAULT_PROJECT,
        "entity": tracking.entity,
        "group": tracking.group,
        "tags": tracking.tags or None,
        "notes": notes_of(tracking),
        "name": _value("WANDB_NAME") or name,
    }


def notes_of(tracking: TrackingConfig) -> str | None:
    """Return the user's notes about the run."""
    return tracking.notes or _value("WANDB_NOTES") or None


def warn_of_unused(config: RunConfig, warn: Callable[[str], None]) -> None:
    """Name the variables that this run does not use, with the reason."""
    tracking = config.tracking
    chosen: Mapping[str, tuple[str, str]] = {
        "WANDB_PROJECT": ("tracking.project", tracking.project or ""),
        "WANDB_ENTITY": ("tracking.entity", tracking.entity or ""),
        "WANDB_RUN_GROUP": ("tracking.group", tracking.group or ""),
        "WANDB_TAGS": ("tracking.tags", ",".join(tracking.tags)),
        "WANDB_NOTES": ("tracking.notes", tracking.notes or ""),
    }
    for variable, (key, value) in chosen.items():
        if value and _value(variable) not in ("", value):
            warn(f"{variable} is not used: {key} is set")
    mode = _value("WANDB_MODE")
    if mode and mode not in _MODES:
        warn(f"WANDB_MODE={mode} is not used: it is not online, offline or disabled")
    elif mode and tracking.wandb not in (WandbMode.auto, _MODES[mode]):
        warn(f"WANDB_MODE={mode} is not used: tracking.wandb is {tracking.wandb}")
    if _value("WANDB_DIR"):
        warn("WANDB_DIR is not used: the files of wandb are in the run directory")


def _value(variable: str) -> str:
    """Return a variable of the environment; an empty text if it is not set."""
    return os.environ.get(variable, "").strip()


Mode = Literal["online", "offline"]
MediaOf = Callable[[int, Mapping[str, float]], Mapping[str, Any]]
"""Tables and histograms of a row, from its index among the tracker's rows and the row."""

_log = logging.getLogger(__name__)


@dataclass
class Session:
    """A wandb run since its last start.

    Attributes:
        run: the wandb run.
        received: place of the last row that wandb has.
        row_number: wandb's number of the next row, which continues over all starts of an offline run; None:
            wandb counts, from the server's number of rows (`run.step` of a resumed run is 0 before a row).
        looked_at: rows of the tracker that were sent or found to be there.
        growth: of wandb's file.
        takes_system: False once wandb has shown that it takes no system metrics.
    """

    run: "wandb.Run"
    received: RowOrder
    row_number: int | None
    growth: FileGrowth
    looked_at: int = 0
    takes_system: bool = True

    def send(self, rows: Sequence[Mapping[str, float]], media: MediaOf) -> None:
        """Send the rows that wandb does not have yet, with their media."""
        for index, row in enumerate(rows[self.looked_at :], self.looked_at):
            if order_of(row) > self.received:
                self._log(wandb_names(row), media(index, row))
                self.growth.note_sent()
                if self.row_number is not None:
                    self.row_number += 1
                self.received = order_of(row)
            self.looked_at = index + 1

    def send_system(self, values: Mapping[str, float]) -> None:
        """Send system metrics as wandb does its own, with the time of now; they are no rows."""
        # No public function does so. Shared mode, wandb's way to system metrics of several nodes, numbers no
        # rows, so that they come twice after a kill, and needs a server.
        run: Any = self.run
        try:
            run._interface.publish_stats(dict(values))
            self.growth.note_sent()
        except AttributeError:
            if self.takes_system:
                _log.warning("this version of wandb takes no system metrics of ranks")
            self.takes_system = False

    def _log(self, values: Mapping[str, float], media: Mapping[str, Any]) -> None:
        try:
            self.run.log({**values, **media}, step=self.row_number, commit=True)
        except ConnectionError:
            raise
        except Exception as error:
            if not media:
                raise
            _log.warning("wandb does not take %s: %s", ", ".join(media), first_line(error))
            self.run.log(dict(values), step=self.row_number, commit=True)


def start_run(
    config: RunConfig,
    folder: RunFolder,
    mode: Mode,
    environment: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> Session:
    """Start or resume the wandb run of a run directory.

    Args:
        config: logged completely, without secrets.
        folder: the run directory.
        mode: online or offline.
        environment: content of `environment.json`.
        settings: further settings of wandb.
    """
    client = set_up(mode)
    run_id = _run_id(folder)
    last = _last_written(folder.wandb_id.parent, run_id) if mode == "offline" else None
    run: wandb.Run = client.init(
        **without_secrets(run_settings(config, title(config, folder.path))),
        id=run_id,
        resume="allow",
        dir=folder.path,
        mode=mode,
        config=without_secrets({**dataclasses.asdict(config), "environment": dict(environment or {})}),
        allow_val_change=True,
        settings=client.Settings(
            silent=True,
            reinit="create_new",  # a run that the caller has open stays the caller's
            console="off",
            save_code=False,
            disable_git=True,
            finish_timeout_raises=True,
            x_disable_meta=without_secrets(sys.argv) != sys.argv,  # it has the command line as typed
            x_transaction_log_flush_interval=1.0,  # seconds of rows that a killed offline run can lose
            **settings,
        ),
    )
    run.define_metric(STEP_AXIS)
    for names in ("train/*", "eval/*"):
        run.define_metric(names, step_metric=STEP_AXIS)
    _log.info("wandb run %s: %s", run.id, address(run, mode, folder))
    growth = FileGrowth(Path(run.sync_dir))
    if last is not None:
        return Session(run, order_of_sent(last), last["_step"] + 1, growth)
    return Session(run, order_of_sent(_known(run)), None if mode == "online" else 0, growth)


def _known(run: "wandb.Run") -> dict[str, Any]:
    """Return the summary's values that the server has for the last row."""
    summary: Any = run.summary
    return {name: summary[name] for name in (STEP_AXIS, EVALUATED_AT) if name in summary.keys()}  # noqa: SIM118


def _last_written(folder: Path, run_id: str) -> dict[str, Any] | None:
    """Return the last row of earlier starts by its number: the clocks of two nodes may differ.

    wandb itself does not read it when it resumes offline.
    """
    from dpo_dist.insight.metrics.wandb_file import drop_empty, read_rows  # noqa: PLC0415 (imports wandb)

    drop_empty(folder, run_id)
    return max(read_rows(folder, run_id), key=lambda row: row["_step"], default=None)


def set_up(mode: Mode) -> Any:
    """Import wandb and return it, with its console output switched off."""
    import wandb  # noqa: PLC0415

    wandb.setup(wandb.Settings(silent=True, mode=mode))
    return wandb


def _run_id(folder: RunFolder) -> str:
    path = folder.wandb_id
    if not path.exists():
        files.write_text(path, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()


def address(run: "wandb.Run", mode: Mode, folder: RunFolder) -> str:
    """Return the address of the run's page, or the command that uploads it later."""
    return str(run.url) if mode == "online" else f"offline; upload with: {upload_command(folder)}"


def upload_command(folder: RunFolder) -> str:
    """Return the command that uploads all starts of a run."""
    return _upload(folder.wandb_id.parent)


def _upload(path: Path | str) -> str:
    return f"wandb sync {shlex.quote(str(path))}"


def close(
    run: "wandb.Run",
    outcome: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    notes: str | None,
    warn: Callable[[str], None],
    log_files: Callable[[], None],
) -> None:
    """Write the summary, the verdict and the outcome, and wait for uploads.

    Args:
        run: the wandb run.
        outcome: of the run.
        summary: the content of summary.json.
        rows: metrics rows of all starts.
        notes: of the user; the verdict follows them on the run's page.
        warn: called if not everything could be uploaded.
        log_files: logs the artifacts.
    """
    run.summary.update({**last_and_best(rows), **without_secrets(summary)})
    sentence = summary.get("verdict", {}).get("sentence")
    if sentence is not None:
        run.notes = "\n\n".join(without_secrets([*([notes] if notes else []), f"Verdict: {sentence}"]))
    if outcome == RunOutcome.preempted:
        run.mark_preempting()
    log_files()
    try:
        run.finish(exit_code=ExitCode[outcome])
    except TimeoutError:
        warn(f"wandb has not uploaded everything; later: {_upload(run.sync_dir)}")


def tear_down(*, is_dead: bool = False) -> bool:
    """End wandb's service, so that it releases the run id and prints nothing when the program ends.

    Returns whether it has ended, so that its files are complete.

    Args:
        is_dead: the service has ended already; else a service that also has a run of the caller is kept.
    """
    # wandb raises SystemExit if its service ended with an error.
    with contextlib.suppress(Exception, SystemExit):
        import wandb  # noqa: PLC0415

        if is_dead or wandb.run is None:
            wandb.teardown()
            return True
    return False


def services() -> set[psutil.Process]:
    """Return the services of wandb that this process has started."""
    with contextlib.suppress(psutil.Error):
        return {child for child in psutil.Process().children() if child.name().startswith("wandb-core")}
    return set()


def kill_services(others: Collection[psutil.Process]) -> None:
    """Kill wandb's service, so that a call that waits for it returns; its file has all rows.

    `others` live on: they were there before the run, and have runs of the caller.
    """
    for service in services().difference(others):
        with contextlib.suppress(psutil.Error):
            service.kill()


_COLUMNS = (
    "step",
    "source",
    "prompt",
    "policy",
    "reference",
    "chosen",
    "policy_tokens",
    "policy_finished",
)
_MOST_CHARACTERS = 4000
_SAMPLED = "eval_samples/"
_LARGEST_FILE_BYTES = 5_000_000
_STAGING = "WANDB_DATA_DIR"


@dataclass
class RunMedia:
    """Tables, histograms and artifacts of a run.

    Attributes:
        folder: the run directory.
        most_samples: rows of a table of samples; with 0 no texts of data or responses are sent.
        margins: histogram of a row, by the row's index.
        is_wanted: False: there is time for rows only.
    """

    folder: RunFolder
    most_samples: int
    margins: dict[int, Histogram] = field(default_factory=dict)
    is_wanted: bool = True

    def of_row(self, index: int, row: Mapping[str, float]) -> dict[str, Any]:
        """Return the histogram and the table of a row, as far as it has them."""
        margins = self.margins.pop(index, None)
        if not self.is_wanted:
            return {}
        media: dict[str, Any] = {}
        if margins is not None:
            import wandb  # noqa: PLC0415

            media[MARGINS] = wandb.Histogram(np_histogram=(margins.counts, margins.edges))
        if self.most_samples and any(name.startswith(_SAMPLED) for name in row):
            media |= _samples_table(self.folder.samples_file(int(row["step"])), self.most_samples)
        return media

    def log_artifacts(self, run: "wandb.Run", summary: Mapping[str, Any]) -> None:
        """Log the run's files as artifacts, by reference: no file but a small report page is read or sent."""
        for kind, paths in self._files(summary).items():
            if self.is_wanted and paths:
                try:
                    run.log_artifact(self._artifact(run, kind, paths))
                except ConnectionError:
                    raise
                except Exception as error:
                    _log.warning("wandb does not take the artifact %s: %s", kind, first_line(error))

    def _files(self, summary: Mapping[str, Any]) -> dict[str, list[Path]]:
        """Return the existing files and folders by the type of their artifact."""
        folder = self.folder
        checkpoints = checkpoint_folders(folder.checkpoints)
        entries = summary.get("reference", {}).get("entries")
        files: dict[str, list[Path]] = {
            "model": [folder.model],
            "checkpoint": checkpoints[:1],
            "reference-store": list(Path(entries).glob("*.json")) if entries else [],
            "report": [folder.report, folder.doctor_report, folder.doctor_page, folder.evaluation.results],
        }
        return {kind: [path for path in paths if path.exists()] for kind, paths in files.items()}

    def _artifact(self, run: "wandb.Run", kind: str, paths: list[Path]) -> "wandb.Artifact":
        import wandb  # noqa: PLC0415

        metadata = {"paths": [str(path.absolute()) for path in paths], "run directory": str(self.folder)}
        artifact = wandb.Artifact(f"{run.id}-{kind}", type=kind, metadata=without_secrets(metadata))
        for path in paths:
            is_small = path == self.folder.report and path.stat().st_size <= _LARGEST_FILE_BYTES
            if is_small and self.most_samples:
                artifact.add_file(str(path))
            else:
                name = None if path.is_file() else path.name
                artifact.add_reference(path.absolute().as_uri(), name=name, checksum=False)
        return artifact


@contextlib.contextmanager
def staged_in(folder: RunFolder) -> Iterator[None]:
    """Let wandb write the files of tables into the run directory; by default it writes them into the home.

    wandb reads the folder from a variable only. The main thread sets it, for as long as trackers are open.
    """
    if _STAGING in os.environ:
        yield
        return
    os.environ[_STAGING] = str((folder.wandb_id.parent / "staging").absolute())
    try:
        yield
    finally:
        os.environ.pop(_STAGING, None)


def _samples_table(path: Path, most: int) -> dict[str, Any]:
    """Return the table of an evaluation's samples; nothing if their file cannot be read."""
    import wandb  # noqa: PLC0415

    try:
        rows = [row for row in islice(json_rows(path), most) if row is not None]
        data = [[_cell(row[name]) for name in _COLUMNS] for row in rows]
    except (OSError, KeyError) as error:
        _log.warning("no table of samples: %s: %s", path, first_line(error))
        return {}
    if not data:
        _log.warning("no table of samples: %s has none", path)
        return {}
    return {SAMPLES: wandb.Table(columns=list(_COLUMNS), data=data, allow_mixed_types=True)}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    cut = value[:_MOST_CHARACTERS]
    return without_secrets(cut if len(cut) == len(value) else f"{cut} ...")


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
