"""A wandb run from its start to its end: what `wandb_tracker` guards against errors of wandb."""

import contextlib
import dataclasses
import logging
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from dpo_dist import atomic
from dpo_dist.config.identity import title
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ExitCode, RunOutcome, first_line
from dpo_dist.report.trackers.tracked_values import (
    EVALUATED_AT,
    STEP_AXIS,
    RowOrder,
    last_and_best,
    order_of,
    order_of_sent,
    wandb_names,
)
from dpo_dist.report.trackers.wandb_disk import FileGrowth
from dpo_dist.report.trackers.wandb_environment import run_settings
from dpo_dist.secret_text import without_secrets

if TYPE_CHECKING:
    import wandb

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
    from dpo_dist.report.trackers.wandb_file import drop_empty, read_rows  # noqa: PLC0415 (imports wandb)

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
        atomic.write_text(path, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12])
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
