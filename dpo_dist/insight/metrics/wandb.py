"""Weights & Biases: a wandb run that gets every metrics row once, over all starts of a run."""

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
_MOST_CHARACTERS = 4000
_STAGING = "WANDB_DATA_DIR"

_log = logging.getLogger(__name__)


class Tracker:
    """A wandb run, online or offline; its methods raise what wandb raises.

    Args:
        init: arguments of `wandb.init`.
        config: of the run.
        folder: the run directory.
        rows: metrics rows of earlier starts; those that wandb does not have are sent.
        say: called with what a user should know.

    Attributes:
        run: the wandb run.
        received: place of the last row that wandb has.
    """

    run: "wandb.Run"
    received: RowOrder

    def __init__(
        self,
        init: Mapping[str, Any],
        config: RunConfig,
        folder: RunFolder,
        rows: Sequence[Mapping[str, float]],
        say: Callable[[str], None],
    ):
        self._init, self._tracking, self._folder, self._say = init, config.tracking, folder, say
        self._rows = list(rows)
        self._is_restarted = False
        self._has_row = False  # wandb had the last row before it was logged here
        # wandb's number of the next row, over all starts of an offline run. None: wandb itself knows it from
        # the server (`run.step` of a resumed run is 0 before a row).
        self._number: int | None = None
        self._start()

    def _start(self) -> None:
        """Start or resume the wandb run, and send it the rows that it lacks."""
        offline, last = self._init["mode"] == "offline", None
        if offline:
            from dpo_dist.insight.metrics.wandb_file import last_row  # noqa: PLC0415 (imports wandb)

            last = last_row(self._folder.wandb_id.parent, self._init["id"])
        client = _set_up(self._init["mode"])
        self.run = client.init(**self._init)
        self.run.define_metric(STEP_AXIS)
        for names in ("train/*", "eval/*"):
            self.run.define_metric(names, step_metric=STEP_AXIS)
        self.received = order_of_sent(last or dict(self.run.summary))
        self._number = (last["_step"] + 1 if last else 0) if offline else None
        for row in self._rows:
            self._send(row)

    @property
    def address(self) -> str:
        """The address of the run's page, or the command that uploads it later."""
        command = f"offline; upload with: {upload_command(self._folder)}"
        return command if self._init["mode"] == "offline" else str(self.run.url)

    def log(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        """Send a row under the names of `wandb_names`, unless wandb has it: its step was computed twice."""
        self._has_row = order_of(row) <= self.received
        self._rows.append(row)
        self._do(lambda: self._send(row, margins))

    def alert(self, title: str, text: str) -> None:
        """Raise an alert of wandb, but about a row that an earlier start sent: that start raised it."""
        if not self._has_row:
            self._do(lambda: self.run.alert(title=title, text=text))

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close the run: verdict, summary (as in `summary.json`), outcome."""
        self._do(lambda: self._close(outcome, summary))
        tear_down()

    def _send(self, row: Mapping[str, float], margins: Histogram | None = None) -> None:
        if order_of(row) <= self.received:
            return
        values: dict[str, Any] = dict(wandb_names(row))
        if margins is not None:
            import wandb  # noqa: PLC0415

            values[MARGINS] = wandb.Histogram(np_histogram=margins)
        if self._tracking.samples and "eval_samples/length" in row:
            file = self._folder.samples_file(int(row["step"]))
            values |= _samples_table(file, self._tracking.samples)
        self.run.log(values, step=self._number, commit=True)
        self._number = None if self._number is None else self._number + 1
        self.received = order_of(row)

    def _close(self, outcome: str, summary: Mapping[str, Any]) -> None:
        self.run.summary.update({**last_and_best(self._rows), **without_secrets(summary)})
        if "verdict" in summary:
            notes = [_variable("WANDB_NOTES")]
            notes += [f"Verdict: {summary['verdict']['sentence']}"]
            self.run.notes = "\n\n".join(without_secrets(list(filter(None, notes))))
        if outcome == RunOutcome.preempted:
            self.run.mark_preempting()
        if self._folder.model.exists():
            self._log_model()
        try:
            self.run.finish(exit_code=ExitCode[outcome])
        except TimeoutError:
            _warn(f"wandb has not uploaded everything; later: {upload_command(self._folder)}", self._say)

    def _log_model(self) -> None:
        """Log the model as an artifact by reference: no file is read or sent."""
        import wandb  # noqa: PLC0415

        model, name = self._folder.model.absolute(), f"{self.run.id}-model"
        artifact = wandb.Artifact(name, "model", metadata=without_secrets({"path": str(model)}))
        artifact.add_reference(model.as_uri(), name=model.name, checksum=False)
        self.run.log_artifact(artifact)

    def _do(self, action: Callable[[], object]) -> None:
        """Call `action`; once again if wandb's service, which gets a signal to stop as well, has died."""
        try:
            try:
                action()
            except ConnectionError:
                tear_down(is_dead=True)
                if self._is_restarted:
                    raise
                self._is_restarted = True
                self._start()
                action()
        except Exception:
            tear_down()
            raise


def _samples_table(path: Path, most: int) -> dict[str, Any]:
    """Return the table of an evaluation's samples."""
    import wandb  # noqa: PLC0415

    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, most)]
    data = [[_cell(value) for value in row.values()] for row in rows]
    return {SAMPLES: wandb.Table(columns=list(rows[0]), data=data, allow_mixed_types=True)} if rows else {}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    cut = value[:_MOST_CHARACTERS]
    return without_secrets(cut if len(cut) == len(value) else f"{cut} ...")


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

    If wandb cannot go online, the run is stored in the directory for a later upload.

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
    limits = {"init_timeout": init_seconds, "finish_timeout": finish_seconds, "stop_fn": request_stop}
    for mode in _modes_to_try(wanted_mode(config), say):
        try:
            init = _init_arguments(config, folder, mode, environment or {}, limits)
            tracker = Tracker(init, config, folder, rows, say)
        except Exception as error:
            _warn(f"wandb cannot start {mode}: {first_line(error)}", say)
            tear_down()
            continue
        if tracker.received.step > (rows[-1]["step"] if rows else 0):
            say(f"wandb has the rows up to step {tracker.received.step}; they are not sent again")
        say(f"wandb: {tracker.address}")
        _log.info("wandb run %s: %s", tracker.run.id, tracker.address)
        return tracker
    return None


def wanted_mode(config: RunConfig) -> WandbMode:
    """Return `tracking.wandb`; if it is `auto`, the mode of WANDB_MODE if that is set."""
    wanted = config.tracking.wandb
    return _MODES.get(_variable("WANDB_MODE"), wanted) if wanted is WandbMode.auto else wanted


def _modes_to_try(wanted: WandbMode, say: Callable[[str], None]) -> list[Mode]:
    if wanted in (WandbMode.off, WandbMode.offline):
        return [] if wanted is WandbMode.off else ["offline"]
    try:
        has_key = _set_up("online").login(prompt=False, verify=False)
    except Exception as error:
        _warn(f"wandb cannot log in: {first_line(error)}", say)
        has_key = False
    if not has_key and wanted is WandbMode.online:
        _warn("wandb has no usable key, the run is tracked offline; `wandb login` stores a key", say)
    return ["online", "offline"] if has_key else ["offline"]


def _init_arguments(
    config: RunConfig,
    folder: RunFolder,
    mode: Mode,
    environment: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> dict[str, Any]:
    """Return arguments of `wandb.init`; wandb reads the variable of an argument that is None."""
    tracking, client = config.tracking, _set_up(mode)
    if not folder.wandb_id.exists():
        files.write_text(folder.wandb_id, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12])
    described: dict[str, Any] = without_secrets(
        {
            "project": tracking.project or _variable("WANDB_PROJECT") or DEFAULT_PROJECT,
            "notes": _variable("WANDB_NOTES") or None,
            "name": _variable("WANDB_NAME") or title(config, folder.path),
            "config": {**dataclasses.asdict(config), "environment": dict(environment)},
        }
    )
    return {
        **described,
        "id": folder.wandb_id.read_text(encoding="utf-8").strip(),
        "resume": "allow",
        "dir": folder.path,
        "mode": mode,
        "allow_val_change": True,
        "settings": client.Settings(
            silent=True,
            reinit="create_new",  # a run that the caller has open stays the caller's
            console="off",
            save_code=False,
            disable_git=True,
            finish_timeout_raises=True,
            x_disable_meta=without_secrets(sys.argv) != sys.argv,  # it has the command line as typed
            x_transaction_log_flush_interval=1.0,  # seconds of rows that a killed offline run can lose
            **limits,
        ),
    }


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def _set_up(mode: Mode) -> Any:
    """Import wandb and return it, with its console output switched off."""
    import wandb  # noqa: PLC0415

    wandb.setup(wandb.Settings(silent=True, mode=mode))
    return wandb


def _warn(text: str, say: Callable[[str], None]) -> None:
    _log.warning(text)
    say(f"warning: {text}")


def upload_command(folder: RunFolder) -> str:
    """Return the command that uploads all starts of a run."""
    return f"wandb sync {shlex.quote(str(folder.wandb_id.parent))}"


def tear_down(*, is_dead: bool = False) -> None:
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

    wandb reads the folder from a variable only, which the main thread sets.
    """
    if _STAGING in os.environ:
        yield
        return
    os.environ[_STAGING] = str((folder.wandb_id.parent / "staging").absolute())
    try:
        yield
    finally:
        os.environ.pop(_STAGING, None)
