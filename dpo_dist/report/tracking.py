"""Weights & Biases: the only module that imports `wandb`. Rank 0 only.

Tracking never stops a run and never prompts for a login. An exception of wandb becomes one warning; then
tracking is off and training continues.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from dpo_dist import atomic
from dpo_dist.config.identity import title
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig, WandbMode
from dpo_dist.errors import ExitCode, RunOutcome

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline"]

STEP_AXIS = "train/global_step"

_MODE_BY_ENVIRONMENT = {
    "online": WandbMode.online,
    "offline": WandbMode.offline,
    "disabled": WandbMode.off,
}

_log = logging.getLogger(__name__)


def _silent(_text: str) -> None:
    """Print nothing."""


class Tracker:
    """One wandb run, or none.

    Attributes:
        run: the wandb run; None if tracking is off, has failed or is finished.
    """

    def __init__(self, start: "Callable[[], wandb.Run] | None", say: Callable[[str], None] = _silent):
        self.run = start() if start else None
        self._restart = start
        self._say = say

    def log(self, row: Mapping[str, float]) -> None:
        """Send one metrics row under the names of `wandb_names`."""
        named = wandb_names(row)
        self._act(lambda run: run.log(named))

    def finish(self, outcome: str, summary: Mapping[str, Any]) -> None:
        """Close the run. Data that cannot be uploaded in time stay in the run directory, with a warning.

        Args:
            outcome: `completed`, `preempted`, `diverged` or `failed`.
            summary: as in `summary.json`.
        """
        self._act(lambda run: _close(run, outcome, summary, self._say))
        if self.run is not None:
            self.run = None
            _tear_down()

    def _act(self, action: "Callable[[wandb.Run], None]") -> None:
        if self.run is None:
            return
        try:
            try:
                action(self.run)
            except ConnectionError:
                # The signal of a preemption also kills wandb's service, which is a process of its own, while
                # rows are still to be sent.
                _tear_down()
                if self._restart is None:
                    raise
                self.run, self._restart = self._restart(), None
                action(self.run)
        except Exception as error:
            _warn(f"wandb tracking stops, training continues: {_one_line(error)}", self._say)
            self.run = None
            _tear_down()


def wandb_names(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row with the W&B keys of transformers' and TRL's trainers, so that runs can be compared.

    `eval_loss` becomes `eval/loss`, every other key `train/<key>`; `step` is `train/global_step`, the x axis.
    """
    named = {}
    for key, value in row.items():
        if key == "step":
            named[STEP_AXIS] = value
        elif key.startswith("eval_"):
            named[f"eval/{key.removeprefix('eval_')}"] = value
        else:
            named[f"train/{key}"] = value
    return named


def open_tracker(
    config: RunConfig,
    folder: RunFolder,
    request_stop: Callable[[], None],
    *,
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
        config: logged completely.
        folder: the run directory.
        request_stop: called from another thread if someone stops the run on its web page.
        environment: content of `environment.json`, logged beside `config`.
        say: called with the address of the run, and with the reason if it is not online.
        init_seconds: timeout for the server at the start.
        finish_seconds: timeout for uploads at the end; a preempted job has little time.
    """
    wanted = config.tracking.wandb
    if wanted is WandbMode.auto:
        wanted = _MODE_BY_ENVIRONMENT.get(os.environ.get("WANDB_MODE", ""), wanted)
    settings = {"init_timeout": init_seconds, "finish_timeout": finish_seconds, "stop_fn": request_stop}
    for mode in _modes_to_try(wanted, say):
        try:
            tracker = Tracker(functools.partial(_start, config, folder, mode, environment, settings), say)
        except Exception as error:
            _warn(f"wandb cannot start {mode}: {_one_line(error)}", say)
            _tear_down()
            continue
        if tracker.run is not None:
            say(f"wandb: {_address(tracker.run, mode)}")
        return tracker
    return Tracker(None)


def _address(run: "wandb.Run", mode: Mode) -> str:
    return str(run.url) if mode == "online" else f"offline; upload with: wandb sync {run.settings.sync_dir}"


def _warn(text: str, say: Callable[[str], None]) -> None:
    _log.warning(text)
    say(text)


def _modes_to_try(wanted: WandbMode, say: Callable[[str], None]) -> list[Mode]:
    if wanted is WandbMode.off:
        return []
    if wanted is WandbMode.offline:
        return ["offline"]
    try:
        has_key = _set_up("online").login(prompt=False, verify=False)
    except Exception as error:
        _warn(f"wandb cannot log in: {_one_line(error)}", say)
        has_key = False
    if has_key:
        return ["online", "offline"]
    if wanted is WandbMode.online:
        _warn("wandb has no usable key, the run is tracked offline; `wandb login` stores a key", say)
    return ["offline"]


def _start(
    config: RunConfig,
    folder: RunFolder,
    mode: Mode,
    environment: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> "wandb.Run":
    client = _set_up(mode)
    run: wandb.Run = client.init(
        project=config.tracking.project,
        entity=config.tracking.entity,
        group=config.tracking.group,
        tags=config.tracking.tags,
        name=title(config, folder.path),
        id=_run_id(folder),
        resume="allow",
        dir=folder.path,
        mode=mode,
        config={**dataclasses.asdict(config), "environment": dict(environment or {})},
        allow_val_change=True,
        settings=client.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            finish_timeout_raises=True,
            **settings,
        ),
    )
    # On its built-in axis wandb drops rows whose step does not increase: evaluations, and steps that a
    # resumed run computes again.
    run.define_metric(STEP_AXIS)
    run.define_metric("*", step_metric=STEP_AXIS)
    _log.info("wandb run %s: %s", run.id, _address(run, mode))
    return run


def _set_up(mode: Mode) -> Any:
    """Import wandb and return it, with its console output switched off."""
    import wandb  # noqa: PLC0415

    wandb.setup(wandb.Settings(silent=True, mode=mode))
    return wandb


def _run_id(folder: RunFolder) -> str:
    path = folder.wandb_id
    if not path.exists():
        atomic.write_text(path, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()


def _close(run: "wandb.Run", outcome: str, summary: Mapping[str, Any], say: Callable[[str], None]) -> None:
    run.summary.update(dict(summary))
    if outcome == RunOutcome.preempted:
        run.mark_preempting()
    try:
        run.finish(exit_code=ExitCode[outcome])
    except TimeoutError:
        _warn(f"wandb has not uploaded everything; later: wandb sync {run.settings.sync_dir}", say)


def _tear_down() -> None:
    """End wandb's service, so that it releases the run id and prints nothing when the program ends."""
    # wandb raises SystemExit if its service ended with an error.
    with contextlib.suppress(Exception, SystemExit):
        import wandb  # noqa: PLC0415

        wandb.teardown()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
