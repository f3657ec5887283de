"""Send each metrics row once to W&B, over all starts of a run, with histograms, samples and the verdict."""

import contextlib
import json
import os
import shlex
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from dpo_dist.config.metrics import PREFIX
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import DEFAULT_PROJECT, TrackingConfig
from dpo_dist.foundation import files
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ExitCode, RunOutcome, first_line
from dpo_dist.foundation.text import without_secrets
from dpo_dist.foundation.types import Fields, dotted_items
from dpo_dist.objective.metrics import PairColumn
from dpo_dist.training.reporting.metrics_log import MetricsRow, log_position, note_best, stored_rows

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline"]
WantedMode = Mode | Literal["auto"]
"""`auto`: online if there is an API key, else offline."""

STEP_AXIS = "train/global_step"
EVALUATED_AT = "eval/global_step"
MARGINS = "eval/margins_histogram"
SAMPLES = "eval/samples_table"

_MODES: dict[str, WantedMode | None] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": None,
}
"""Modes by value of WANDB_MODE; `run` and `dryrun` are older names, None is no W&B."""
_CELL_CHARACTERS = 4000
_BINS = 64
_HEADER_BYTES = 7


def wandb_name(key: str) -> str:
    """Return a metric's name in W&B, as the trainers of transformers and TRL write it."""
    return f"eval/{key.removeprefix(PREFIX)}" if key.startswith(PREFIX) else f"train/{key}"


def wandb_names(row: MetricsRow) -> dict[str, float]:
    """Return a row with W&B names; its step is `train/global_step`, for an evaluation also `eval/...`."""
    values = {wandb_name(key): value for key, value in row.items() if key != "step"}
    axes = (STEP_AXIS, EVALUATED_AT) if log_position(row) > row["step"] else (STEP_AXIS,)
    return dict.fromkeys(axes, row["step"]) | values


@dataclass(frozen=True)
class TrackedRun:
    """Facts of a run that its trackers show."""

    folder: RunFolder
    tracking: TrackingConfig
    title: str
    settings: Fields  # the whole configuration, and the environment
    max_samples: int  # rows of the table of samples
    stop: Callable[[], None]  # called, from another thread, when someone stops the run on its W&B page


class WandbRun:
    """The wandb run of a run directory, online or offline; methods raise wandb's errors.

    Sends those rows of earlier starts, up to the position `end`, that wandb does not have. Not accelerate's
    class, which has one way to start: it neither goes on offline, resumes a run whose service died, nor sends
    histograms and tables with their rows.
    """

    run: "wandb.Run"
    is_over = False  # true when wandb's service was ended, so that it is not started again

    def __init__(self, tracked: TrackedRun, mode: Mode, end: float):
        folder = tracked.folder
        self._max_samples = tracked.max_samples
        self._folder = folder
        self._is_offline = mode == "offline"
        if not folder.wandb_id.exists():
            files.write_text(folder.wandb_id, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12])
        described: dict[str, Any] = {
            "project": tracked.tracking.project or _environment_variable("WANDB_PROJECT") or DEFAULT_PROJECT,
            "notes": _environment_variable("WANDB_NOTES") or None,  # None: wandb reads the variable itself
            "name": _environment_variable("WANDB_NAME") or tracked.title,
            "config": dict(tracked.settings),
        }
        self._init = without_secrets(described) | {
            "id": folder.wandb_id.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "dir": folder.path,
            "mode": mode,
            "allow_val_change": True,
            "settings": _set_up(mode).Settings(
                silent=True,
                reinit="create_new",  # else wandb would end a run that the caller has open
                console="off",
                save_code=False,
                disable_git=True,
                stop_fn=tracked.stop,
                # wandb's metadata would have the command with its secrets.
                x_disable_meta=without_secrets(sys.argv) != sys.argv,
                x_transaction_log_flush_interval=1.0,  # seconds; a killed offline run loses rows of this time
            ),
        }
        self._sent = folder.wandb_id.with_name(f"sent-{self._init['id']}.json")
        self._end = end
        self._received = -1.0
        self._count = 0
        self._last = MetricsRow()
        self._best = dict[str, MetricsRow]()
        self._start()

    def _start(self) -> None:
        """Start or resume the wandb run, and send it the rows that it lacks."""
        for file in self._sent.parent.glob("*run-*/*.wandb"):
            if file.stat().st_size <= _HEADER_BYTES:  # of a killed start; it would break `wandb sync`
                file.unlink()
        self.run = _set_up(self._init["mode"]).init(**self._init)
        self.run.define_metric(STEP_AXIS)
        for names in ("train/*", "eval/*"):
            self.run.define_metric(names, step_metric=STEP_AXIS)
        if self._is_offline and self._sent.exists():
            self._received = json.loads(self._sent.read_bytes())
        else:
            summary = dict(self.run.summary)
            step = summary.get(STEP_AXIS, -1)
            self._received = step + (summary.get(EVALUATED_AT) == step) / 2
        self._count = 0
        for row in stored_rows(self._folder, self._end):
            self._send(row)

    def log(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Send a row with W&B names, unless wandb has it because a resumed run computed the step again."""
        self._retry(lambda: self._send(row, margins))

    def finish(self, outcome: str, summary: Fields) -> None:
        """Close the run with its outcome, its summary (as in `summary.json`) and its verdict."""

        def close() -> None:
            # wandb itself knows rows of the last start only. Not `step`: its axis can be ahead of the rows.
            last = {wandb_name(key): value for key, value in self._last.items() if key != "step"}
            best = {f"best/{wandb_name(key)}": row[key] for key, row in self._best.items()}
            self.run.summary.update({**last, **best, **without_secrets(summary)})
            if "verdict" in summary:
                notes = [_environment_variable("WANDB_NOTES"), f"Verdict: {summary['verdict']['sentence']}"]
                self.run.notes = "\n\n".join(without_secrets(list(filter(None, notes))))
            if outcome == RunOutcome.preempted:
                self.run.mark_preempting()
            self.run.finish(exit_code=ExitCode[outcome])

        try:
            self._retry(close)
        finally:
            end_service()

    def _send(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        import wandb  # noqa: PLC0415

        if log_position(row) > self._received:
            values: dict[str, Any] = {**wandb_names(row)}
            finite = [] if margins is None else margins[np.isfinite(margins)].tolist()
            if finite:
                values[MARGINS] = wandb.Histogram(finite, num_bins=_BINS)
            if self._max_samples and "eval_samples/length" in row:
                lines = files.read_lines(self._folder.samples_file(int(row["step"])))
                table = []
                for sample in without_secrets(list(islice(lines, self._max_samples))):
                    sample.pop("images", None)  # thumbnails are for pages
                    cells = dict(dotted_items(sample))
                    for name, cell in cells.items():
                        if isinstance(cell, str):
                            cells[name] = cell[:_CELL_CHARACTERS]
                    table.append(cells)
                rows = [list(cells.values()) for cells in table]
                values[SAMPLES] = wandb.Table(columns=list(table[0]), data=rows, allow_mixed_types=True)
            # Online, wandb gets the row's number from the server.
            self.run.log(values, step=self._count if self._is_offline else None, commit=True)
            self._received = log_position(row)
            files.write_text(self._sent, json.dumps(self._received))
        self._end = log_position(row)
        self._count += 1
        self._last |= row
        note_best(self._best, row)

    def _retry(self, action: Callable[[], object]) -> None:
        """Call `action`; if wandb's service has died of a signal to this run, restart it and call again."""
        try:
            action()
        except ConnectionError:
            if self.is_over:
                raise
            end_service(is_dead=True)
            self._start()
            action()


def open_wandb(tracked: TrackedRun, end: float, console: Console) -> WandbRun | None:
    """Start or resume the wandb run of a run directory; return None if it cannot start.

    Never raises or prompts. A run that cannot go online is stored in the directory for a later upload; the
    reason and the run's address are printed.
    """
    # Without this variable wandb writes the files of tables into the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(tracked.folder.wandb_id.with_name("staging").absolute()))
    for mode in _modes_to_try(wanted_mode(), console):
        try:
            tracker = WandbRun(tracked, mode, end)
        except Exception as error:
            console.warn(f"wandb cannot start {mode}: {first_line(error)}")
            end_service()
            continue
        place = tracker.run.url
        if mode == "offline":
            place = f"offline; upload with: {upload_command(tracked.folder)}"
        console.say(f"wandb: {place}")
        return tracker
    return None


def wanted_mode() -> WantedMode | None:
    """Return the mode in WANDB_MODE, `auto` if it names none; None if W&B is off."""
    return _MODES.get(_environment_variable("WANDB_MODE"), "auto")


def _modes_to_try(mode: WantedMode | None, console: Console) -> list[Mode]:
    if mode is None:
        return []
    if mode == "offline":
        return ["offline"]
    try:
        has_key = _set_up("online").login(prompt=False, verify=False)
    except Exception as error:
        console.warn(f"wandb cannot log in: {first_line(error)}")
        has_key = False
    if not has_key and mode == "online":
        console.warn(
            "wandb has no usable key, and the run is tracked offline; run `wandb login` to store a key"
        )
    return ["online", "offline"] if has_key else ["offline"]


def _environment_variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def _set_up(mode: Mode) -> Any:
    """Import wandb and return it, with its console output switched off."""
    import wandb  # noqa: PLC0415

    wandb.setup(wandb.Settings(silent=True, mode=mode))
    return wandb


def upload_command(folder: RunFolder) -> str:
    """Return the command that uploads all starts of an offline run."""
    return f"wandb sync {shlex.quote(str(folder.wandb_id.parent))}"


def end_service(*, is_dead: bool = False, kills: bool = False) -> None:
    """End wandb's service, so that the run id is free again and nothing is printed when the program ends.

    Keeps a service that has another run of this process, unless the service `is_dead`. `kills`: kill the
    service, which ends a call that waits for it; its file has all rows.
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
