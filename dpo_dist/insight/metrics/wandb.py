"""Weights & Biases: a wandb run that gets every metrics row once, over all starts of a run."""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
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
    Row,
    RowOrder,
    last_and_best,
    order_of,
    order_of_sent,
    wandb_names,
)

if TYPE_CHECKING:
    import wandb

Margins = npt.NDArray[np.float32]
Mode = Literal["online", "offline"]
Say = Callable[[str], None]

_MODES = {
    "online": WandbMode.online,
    "run": WandbMode.online,
    "offline": WandbMode.offline,
    "dryrun": WandbMode.offline,
    "disabled": WandbMode.off,
}
"""Values of WANDB_MODE, the older two too."""
_MOST_CHARACTERS = 4000
_BINS = 64
_FIRST_WAIT_SECONDS, _LAST_SECONDS = 10.0, 2.0
_STAGING = "WANDB_DATA_DIR"
_EMPTY_FILE_BYTES = 7

_log = logging.getLogger(__name__)


class Tracker:
    """A wandb run, online or offline; its methods raise what wandb raises.

    It sends those of `rows`, of earlier starts, that wandb does not have; it has those up to `received`.
    """

    run: "wandb.Run"
    received: RowOrder

    def __init__(
        self, init: Mapping[str, Any], config: RunConfig, folder: RunFolder, rows: Sequence[Row], say: Say
    ):
        self._init, self._tracking, self._folder, self._say = init, config.tracking, folder, say
        self._is_offline = init["mode"] == "offline"
        self._sent = folder.wandb_id.with_name(f"sent-{init['id']}.json")
        self._rows = list(rows)
        self._has_row = False  # wandb had the last row before it was logged here
        self._start()

    def _start(self) -> None:
        """Start or resume the wandb run, and send it the rows that it lacks."""
        if self._is_offline:
            for file in self._sent.parent.glob("*run-*/run-*.wandb"):
                if file.stat().st_size <= _EMPTY_FILE_BYTES:  # of a killed start; `wandb sync` fails on it
                    file.unlink()
        self.run = _set_up(self._init["mode"]).init(**self._init)
        self.run.define_metric(STEP_AXIS)
        for names in ("train/*", "eval/*"):
            self.run.define_metric(names, step_metric=STEP_AXIS)
        self.received = order_of_sent(dict(self.run.summary))
        if self._is_offline and self._sent.exists():
            self.received = RowOrder(*json.loads(self._sent.read_bytes()))
        for number, row in enumerate(self._rows):
            self._send(row, number)

    @property
    def address(self) -> str:
        """The address of the run's page, or the command that uploads it later."""
        return (
            f"offline; upload with: {upload_command(self._folder)}" if self._is_offline else str(self.run.url)
        )

    def log(self, row: Row, margins: Margins | None = None) -> None:
        """Send a row under the names of `wandb_names`, unless wandb has it: its step was computed twice."""
        self._has_row = order_of(row) <= self.received
        self._rows.append(row)
        self._do(lambda: self._send(row, len(self._rows) - 1, margins))

    def alert(self, title: str, text: str) -> None:
        """Raise an alert of wandb, but about a row that an earlier start sent: that start raised it."""
        if not self._has_row:
            self._do(lambda: self.run.alert(title=title, text=text))

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close the run: verdict, summary (as in `summary.json`), outcome."""
        self._do(lambda: self._close(outcome, summary))
        end_service()

    def _send(self, row: Row, number: int, margins: Margins | None = None) -> None:
        if order_of(row) <= self.received:
            return
        import wandb  # noqa: PLC0415

        values: dict[str, Any] = {**wandb_names(row)}
        if margins is not None and (finite := margins[np.isfinite(margins)].tolist()):
            values[MARGINS] = wandb.Histogram(finite, num_bins=_BINS)
        if self._tracking.samples and "eval_samples/length" in row:
            file = self._folder.samples_file(int(row["step"]))
            values |= _samples_table(file, self._tracking.samples)
        # Online, wandb knows its number from the server.
        self.run.log(values, step=number if self._is_offline else None, commit=True)
        self.received = order_of(row)
        files.write_text(self._sent, json.dumps(self.received))

    def _close(self, outcome: str, summary: Mapping[str, Any]) -> None:
        self.run.summary.update({**last_and_best(self._rows), **without_secrets(summary)})
        if "verdict" in summary:
            notes = [_variable("WANDB_NOTES")]
            notes += [f"Verdict: {summary['verdict']['sentence']}"]
            self.run.notes = "\n\n".join(without_secrets(list(filter(None, notes))))
        if outcome == RunOutcome.preempted:
            self.run.mark_preempting()
        try:
            self.run.finish(exit_code=ExitCode[outcome])
        except TimeoutError:
            _warn(f"wandb has not uploaded everything; later: {upload_command(self._folder)}", self._say)

    def _do(self, action: Callable[[], object]) -> None:
        """Call `action`; once again if wandb's service, which gets a signal to stop as well, has died."""
        try:
            action()
        except ConnectionError:
            end_service(is_dead=True)
            self._start()
            action()


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
    rows: Sequence[Row] = (),
    environment: Mapping[str, Any] | None = None,
    say: Say = lambda _text: None,
    init_seconds: float = 60.0,
    finish_seconds: float = 20.0,
) -> Tracker | None:
    """Start or resume the wandb run of a run directory; never raises or prompts. None: off or impossible.

    If wandb cannot go online, the run is stored in the directory for a later upload.

    `say` gets the address of the run, and the reason if it is not online; `init_seconds` are the timeout for
    the server, `finish_seconds` that for uploads at the end; see `open_trackers`.
    """
    limits = {"init_timeout": init_seconds, "finish_timeout": finish_seconds, "stop_fn": request_stop}
    for mode in _modes_to_try(wanted_mode(config), say):
        try:
            init = _init_arguments(config, folder, mode, environment or {}, limits)
            tracker = Tracker(init, config, folder, rows, say)
        except Exception as error:
            _warn(f"wandb cannot start {mode}: {first_line(error)}", say)
            end_service()
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


def _modes_to_try(wanted: WandbMode, say: Say) -> list[Mode]:
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


def _warn(text: str, say: Say) -> None:
    _log.warning(text)
    say(f"warning: {text}")


def upload_command(folder: RunFolder) -> str:
    """Return the command that uploads all starts of a run."""
    return f"wandb sync {shlex.quote(str(folder.wandb_id.parent))}"


def end_service(*, is_dead: bool = False, kills: bool = False) -> None:
    """End wandb's service, so that it releases the run id and prints nothing when the program ends.

    A service that also has a run of the caller is kept, but not one that `is_dead`. One that is killed ends a
    call that waits for it; its file has all rows.
    """
    # wandb raises SystemExit if its service ended with an error.
    with contextlib.suppress(Exception, SystemExit):
        import wandb  # noqa: PLC0415

        if wandb.run is not None and not is_dead:
            return
        if not kills:
            wandb.teardown()
        for child in psutil.Process().children() if kills else ():
            if child.name().startswith("wandb-core"):
                child.kill()


class InBackground:
    """A wandb run that is opened and called in a thread of its own; no method but `finish` waits.

    `start` takes a function for what a user should know; None: there is no run. `first_wait` are the seconds
    to wait for it, so that its messages come in order if it is fast.
    """

    def __init__(
        self,
        start: Callable[[Say], Tracker | None],
        say: Say,
        folder: RunFolder,
        first_wait: float = _FIRST_WAIT_SECONDS,
    ):
        self._say, self._folder, self._is_ended = say, folder, False
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._is_open = threading.Event()
        # wandb writes the files of tables into the home otherwise, and reads the folder from a variable only.
        self._is_staging = _STAGING not in os.environ
        if self._is_staging:
            os.environ[_STAGING] = str(folder.wandb_id.with_name("staging").absolute())
        self._thread = threading.Thread(target=self._work, args=(start,), name="wandb", daemon=True)
        self._thread.start()
        self._is_open.wait(first_wait)

    def log(self, row: Row, margins: Margins | None = None) -> None:
        """Send one metrics row later, in order."""
        self._calls.put(lambda run: run.log(row, margins))

    def alert(self, title: str, text: str) -> None:
        """Raise an alert later, in order."""
        self._calls.put(lambda run: run.alert(title, text))

    def finish(self, outcome: str, summary: Mapping[str, Any], seconds: float) -> None:
        """Close the run; return after about `seconds` even if a call does not return."""
        self._calls.put(lambda run: run.finish(outcome, summary))
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            advice = f"later: {upload_command(self._folder)}"
            _warn(f"wandb has not finished after {seconds:.0f} s and is ended; {advice}", self._say)
            self._is_ended = True  # what the call says now is no news
            end_service(kills=True)
            self._thread.join(_LAST_SECONDS)
        if self._is_staging:
            os.environ.pop(_STAGING, None)

    def _tell(self, text: str) -> None:
        if not self._is_ended:
            self._say(text)

    def _work(self, start: Callable[[Say], Tracker | None]) -> None:
        try:
            run = start(self._tell)
            self._is_open.set()
            while run is not None and (call := self._calls.get()) is not None:
                call(run)
        except Exception as error:
            end_service()
            _warn(f"wandb tracking stops, training continues: {first_line(error)}", self._tell)
        finally:
            self._is_open.set()
