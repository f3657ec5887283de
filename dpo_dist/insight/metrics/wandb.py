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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from dpo_dist.config.identity import title
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import DEFAULT_PROJECT, RunConfig, WandbMode
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
from dpo_dist.insight.pages.render import json_rows

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline"]

_MODES = {
    "online": WandbMode.online,
    "run": WandbMode.online,
    "offline": WandbMode.offline,
    "dryrun": WandbMode.offline,
    "disabled": WandbMode.off,
}
"""Values of WANDB_MODE, the older two too."""
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
_STAGING = "WANDB_DATA_DIR"

_log = logging.getLogger(__name__)


def wanted_mode(config: RunConfig) -> WandbMode:
    """Return `tracking.wandb`; if it is `auto`, the mode of WANDB_MODE if that is set."""
    wanted = config.tracking.wandb
    return _MODES.get(_value("WANDB_MODE"), wanted) if wanted is WandbMode.auto else wanted


def _value(variable: str) -> str:
    return os.environ.get(variable, "").strip()


def _run_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """Return arguments of `wandb.init`; wandb reads the variable of an argument that is None."""
    return {
        "project": config.tracking.project or _value("WANDB_PROJECT") or DEFAULT_PROJECT,
        "notes": _value("WANDB_NOTES") or None,
        "name": _value("WANDB_NAME") or name,
    }


@dataclass
class Session:
    """A wandb run since its last start.

    Attributes:
        run: the wandb run.
        received: place of the last row that wandb has.
        row_number: wandb's number of the next row, which continues over all starts of an offline run; None:
            wandb counts, from the server's number of rows (`run.step` of a resumed run is 0 before a row).
        looked_at: rows of the tracker that were sent or found to be there.
    """

    run: "wandb.Run"
    received: RowOrder
    row_number: int | None
    looked_at: int = 0


def start_run(
    config: RunConfig,
    folder: RunFolder,
    mode: Mode,
    environment: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> Session:
    """Start or resume the wandb run of a run directory."""
    client = _set_up(mode)
    run_id = _run_id(folder)
    last = _last_written(folder.wandb_id.parent, run_id) if mode == "offline" else None
    run: wandb.Run = client.init(
        **without_secrets(_run_settings(config, title(config, folder.path))),
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
    _log.info("wandb run %s: %s", run.id, _address(run, mode, folder))
    if last is not None:
        return Session(run, order_of_sent(last), last["_step"] + 1)
    return Session(run, order_of_sent(_known(run)), None if mode == "online" else 0)


def _known(run: "wandb.Run") -> dict[str, Any]:
    """Return the summary's values that the server has for the last row."""
    summary: Any = run.summary
    return {name: summary[name] for name in (STEP_AXIS, EVALUATED_AT) if name in summary.keys()}  # noqa: SIM118


def _last_written(folder: Path, run_id: str) -> dict[str, Any] | None:
    """Return the last row, by number, of earlier offline starts: wandb itself does not read it."""
    from dpo_dist.insight.metrics.wandb_file import drop_empty, read_rows  # noqa: PLC0415 (imports wandb)

    drop_empty(folder, run_id)
    return max(read_rows(folder, run_id), key=lambda row: row["_step"], default=None)


def _set_up(mode: Mode) -> Any:
    """Import wandb and return it, with its console output switched off."""
    import wandb  # noqa: PLC0415

    wandb.setup(wandb.Settings(silent=True, mode=mode))
    return wandb


def _run_id(folder: RunFolder) -> str:
    path = folder.wandb_id
    if not path.exists():
        files.write_text(path, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()


def _address(run: "wandb.Run", mode: Mode, folder: RunFolder) -> str:
    """Return the address of the run's page, or the command that uploads it later."""
    return str(run.url) if mode == "online" else f"offline; upload with: {upload_command(folder)}"


def upload_command(folder: RunFolder) -> str:
    """Return the command that uploads all starts of a run."""
    return f"wandb sync {shlex.quote(str(folder.wandb_id.parent))}"


def _tear_down(*, is_dead: bool = False) -> None:
    """End wandb's service, so that it releases the run id and prints nothing when the program ends.

    Args:
        is_dead: the service has ended already; else a service that also has a run of the caller is kept.
    """
    # wandb raises SystemExit if its service ended with an error.
    with contextlib.suppress(Exception, SystemExit):
        import wandb  # noqa: PLC0415

        if is_dead or wandb.run is None:
            wandb.teardown()


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
    return {SAMPLES: wandb.Table(columns=list(_COLUMNS), data=data, allow_mixed_types=True)} if data else {}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    cut = value[:_MOST_CHARACTERS]
    return without_secrets(cut if len(cut) == len(value) else f"{cut} ...")


class Tracker:
    """A wandb run that gets every row once, over all starts.

    Args:
        start: starts or resumes the run.
        config: of the run.
        folder: the run directory.
        rows: metrics rows of earlier starts; those that wandb does not have are sent.
        say: called with what a user should know.
    """

    def __init__(
        self,
        start: Callable[[], Session],
        config: RunConfig,
        folder: RunFolder,
        rows: Sequence[Mapping[str, float]],
        say: Callable[[str], None],
    ):
        self._session: Session | None = start()
        self._restart: Callable[[], Session] | None = start
        self._tracking, self._folder, self._say = config.tracking, folder, say
        self._rows = list(rows)
        self._margins: dict[int, Histogram] = {}
        self._is_hurried = False
        self._has_row = False  # wandb had the last row before it was logged here
        if self._session.received.step > (rows[-1]["step"] if rows else 0):
            say(f"wandb has the rows up to step {self._session.received.step}; they are not sent again")
        self._act(self._send)

    @property
    def run(self) -> "wandb.Run | None":
        """The wandb run; None if tracking has failed or is finished."""
        return self._session.run if self._session else None

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send one metrics row under the names of `wandb_names`, unless wandb has a row of this step."""
        if self._session is not None:
            self._has_row = order_of(row) <= self._session.received
            if margins is not None:
                self._margins[len(self._rows)] = margins
            self._rows.append(row)
        self._act(self._send)

    def hurry(self) -> None:
        """Send neither tables nor artifacts from now on."""
        self._is_hurried = True

    def alert(self, title: str, text: str) -> None:
        """Raise an alert of wandb, but about a row that an earlier start sent: that start raised it."""
        if not self._has_row:
            self._act(lambda session: session.run.alert(title=title, text=text))

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close the run: verdict, summary, outcome. Data not uploaded in time stay in the run directory.

        Args:
            outcome: `completed`, `preempted`, `diverged` or `failed`.
            summary: as in `summary.json`.
        """
        self._act(lambda session: self._close(session.run, outcome, summary))
        if self._session is not None:
            self._session = None
            _tear_down()

    def _close(self, run: "wandb.Run", outcome: str, summary: Mapping[str, Any]) -> None:
        run.summary.update({**last_and_best(self._rows), **without_secrets(summary)})
        sentence = summary.get("verdict", {}).get("sentence")
        if sentence is not None:
            notes = _value("WANDB_NOTES")
            run.notes = "\n\n".join(without_secrets([*([notes] if notes else []), f"Verdict: {sentence}"]))
        if outcome == RunOutcome.preempted:
            run.mark_preempting()
        if self._folder.model.exists() and not self._is_hurried:
            self._log_model(run)
        try:
            run.finish(exit_code=ExitCode[outcome])
        except TimeoutError:
            _warn(f"wandb has not uploaded everything; later: {upload_command(self._folder)}", self._say)

    def _log_model(self, run: "wandb.Run") -> None:
        """Log the model as an artifact by reference: no file is read or sent."""
        import wandb  # noqa: PLC0415

        model = self._folder.model.absolute()
        artifact = wandb.Artifact(f"{run.id}-model", "model", metadata=without_secrets({"path": str(model)}))
        artifact.add_reference(model.as_uri(), name=model.name, checksum=False)
        run.log_artifact(artifact)

    def _send(self, session: Session) -> None:
        """Send the rows that wandb does not have yet, with their media."""
        for index, row in enumerate(self._rows[session.looked_at :], session.looked_at):
            if order_of(row) > session.received:
                values = {**wandb_names(row), **self._media(index, row)}
                session.run.log(values, step=session.row_number, commit=True)
                if session.row_number is not None:
                    session.row_number += 1
                session.received = order_of(row)
            session.looked_at = index + 1

    def _media(self, index: int, row: Mapping[str, float]) -> dict[str, Any]:
        """Return the histogram and the table of a row, as far as it has them."""
        margins = self._margins.pop(index, None)
        if self._is_hurried:
            return {}
        media: dict[str, Any] = {}
        if margins is not None:
            import wandb  # noqa: PLC0415

            media[MARGINS] = wandb.Histogram(np_histogram=(margins.counts, margins.edges))
        if self._tracking.samples and any(name.startswith(_SAMPLED) for name in row):
            media |= _samples_table(self._folder.samples_file(int(row["step"])), self._tracking.samples)
        return media

    def _act(self, action: Callable[[Session], None]) -> None:
        if self._session is None:
            return
        try:
            try:
                action(self._session)
            except ConnectionError:
                # The signal of a preemption also kills wandb's service, which is a process of its own, while
                # rows are still to be sent.
                _tear_down(is_dead=True)
                if self._restart is None:
                    raise
                self._session, self._restart = self._restart(), None
                self._send(self._session)
                action(self._session)
        except Exception as error:
            _warn(f"wandb tracking stops, training continues: {first_line(error)}", self._say)
            self._session = None
            _tear_down()


def open_tracker(
    config: RunConfig,
    folder: RunFolder,
    request_stop: Callable[[], None],
    *,
    rows: Sequence[Mapping[str, float]] = (),
    environment: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _text: None,
    init_seconds: float = 60.0,
    finish_seconds: float = 20.0,
) -> Tracker | None:
    """Start or resume the wandb run of a run directory; never raises or prompts. None: off or impossible.

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
    settings = {"init_timeout": init_seconds, "finish_timeout": finish_seconds, "stop_fn": request_stop}
    for mode in _modes_to_try(wanted_mode(config), say):
        try:
            start = functools.partial(start_run, config, folder, mode, environment, settings)
            tracker = Tracker(start, config, folder, rows, say)
        except Exception as error:
            _warn(f"wandb cannot start {mode}: {first_line(error)}", say)
            _tear_down()
            continue
        if tracker.run is not None:
            say(f"wandb: {_address(tracker.run, mode, folder)}")
        return tracker
    return None


def _warn(text: str, say: Callable[[str], None]) -> None:
    _log.warning(text)
    say(f"warning: {text}")


def _modes_to_try(wanted: WandbMode, say: Callable[[str], None]) -> list[Mode]:
    if wanted is WandbMode.off:
        return []
    if wanted is WandbMode.offline:
        return ["offline"]
    try:
        has_key = _set_up("online").login(prompt=False, verify=False)
    except Exception as error:
        _warn(f"wandb cannot log in: {first_line(error)}", say)
        has_key = False
    if has_key:
        return ["online", "offline"]
    if wanted is WandbMode.online:
        _warn("wandb has no usable key, the run is tracked offline; `wandb login` stores a key", say)
    return ["offline"]
