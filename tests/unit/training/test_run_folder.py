"""The run directory: who may write to it, where a start begins, and what says how the run ended."""

import errno
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest

from dpo_dist.config.identity import run_digest
from dpo_dist.config.schema import FolderConfig, ModelConfig, Resume, RunConfig, TrainerConfig
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.errors import CheckpointError, Outcome
from dpo_dist.report.console import Console
from dpo_dist.report.metrics_log import MetricsLog
from dpo_dist.report.page import METRICS_FOLDER
from dpo_dist.report.recorder import Recorder
from dpo_dist.report.tracking import Tracker
from dpo_dist.training.finish import finish
from dpo_dist.training.run_folder import CHECKPOINTS, MODEL, find_start, locked, mark_started
from dpo_dist.training.run_state import (
    STATE_NAME,
    RunState,
    check_identity,
    read_state,
    write_state,
)
from tests.support.alone import ALONE

CONFIG = RunConfig(model=ModelConfig("somewhere"))
IDENTITY = {"run_digest": run_digest(CONFIG), "data": "d", "eval_data": None, "model": "m", "reference": None}
SUMMARY: dict[str, Any] = {"final": {"loss": 0.5}, "best": {}, "steps": 4, "pairs_seen": 24}


class Screen(Console):
    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def config_in(run_dir: Path, keep_last: int = 2, resume: Resume = Resume.auto) -> RunConfig:
    return replace(
        CONFIG, run=FolderConfig(str(run_dir), resume=resume), trainer=TrainerConfig(keep_last=keep_last)
    )


def save_checkpoint(run_dir: Path, step: int) -> None:
    saver = CheckpointSaver(run_dir / CHECKPOINTS, 2, [], ALONE)
    saver.save(step, {"step": step, **IDENTITY})
    saver.commit()


def state_of(outcome: Outcome) -> RunState:
    return RunState(outcome, 4, dict(IDENTITY), SUMMARY if outcome is Outcome.exported else None)


def recorder_in(run_dir: Path) -> Recorder:
    return Recorder(run_dir, MetricsLog.open(run_dir / METRICS_FOLDER, 4), Tracker(None))


def test_the_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    for outcome in Outcome:
        write_state(tmp_path, state_of(outcome))
        assert read_state(tmp_path) == state_of(outcome)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}"),
        '{"outcome": "won", "step": 1, "identity": {}}',
        '{"outcome": "completed", "step": 1, "identity": null}',
        '{"outcome": "completed", "step": "1", "identity": {}}',
    ],
)
def test_a_state_that_cannot_be_read_is_an_error_and_no_fresh_start(content: str, tmp_path: Path) -> None:
    (tmp_path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_start(config_in(tmp_path), tmp_path, ALONE)


@pytest.mark.parametrize("outcome", [Outcome.exported, Outcome.completed])
@pytest.mark.parametrize("resume", [Resume.auto, Resume.must])
def test_a_run_whose_model_is_written_is_finished_without_its_checkpoints(
    outcome: Outcome, resume: Resume, tmp_path: Path
) -> None:
    write_state(tmp_path, state_of(outcome))
    (tmp_path / MODEL).mkdir()
    start = find_start(config_in(tmp_path, resume=resume), tmp_path, ALONE)
    assert start.finished == state_of(outcome)
    assert start.checkpoint is None


def test_a_complete_run_without_its_model_writes_it_again_or_says_that_it_cannot(tmp_path: Path) -> None:
    write_state(tmp_path, state_of(Outcome.completed))
    with pytest.raises(CheckpointError, match="its model and its checkpoints are gone"):
        find_start(config_in(tmp_path), tmp_path, ALONE)
    save_checkpoint(tmp_path, 4)
    start = find_start(config_in(tmp_path), tmp_path, ALONE)
    assert start.finished is None
    assert start.checkpoint is not None
    assert start.checkpoint.state["step"] == 4


@pytest.mark.parametrize("outcome", [None, Outcome.started, Outcome.preempted])
def test_a_fresh_start_never_replaces_a_model(outcome: Outcome | None, tmp_path: Path) -> None:
    if outcome is not None:
        write_state(tmp_path, state_of(outcome))
    assert find_start(config_in(tmp_path), tmp_path, ALONE).checkpoint is None
    (tmp_path / MODEL).mkdir()
    with pytest.raises(CheckpointError, match="move model/ away"):
        find_start(config_in(tmp_path), tmp_path, ALONE)


@pytest.mark.parametrize("name", IDENTITY)
def test_other_inputs_than_the_runs_are_refused_by_name(name: str, tmp_path: Path) -> None:
    check_identity({**IDENTITY, "step": 4}, IDENTITY, tmp_path)
    for recorded in ({**IDENTITY, name: "former"}, {k: v for k, v in IDENTITY.items() if k != name}):
        if recorded.get(name) != IDENTITY[name]:
            with pytest.raises(CheckpointError) as caught:
                check_identity(recorded, IDENTITY, tmp_path)
            words = "configuration" if name == "run_digest" else name.replace("eval_data", "evaluation data")
            assert words in caught.value.what


def test_nothing_says_any_more_how_an_earlier_start_ended(tmp_path: Path) -> None:
    recorder_in(tmp_path).close({**SUMMARY, "exit": "preempted"})
    assert ">preempted<" in (tmp_path / "report.html").read_text()
    (tmp_path / f"{MODEL}.tmp-0123456789ab").mkdir()
    mark_started(tmp_path, state_of(Outcome.started), ALONE)
    assert read_state(tmp_path) == state_of(Outcome.started)
    assert not (tmp_path / METRICS_FOLDER / "summary.json").exists()
    assert ">preempted<" not in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob(f"{MODEL}.*"))


@pytest.mark.parametrize("keep_last", [0, 1])
def test_a_run_that_was_killed_before_its_report_gets_it(keep_last: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4)
    config, screen = config_in(tmp_path, keep_last), Screen()
    finish(config, state_of(Outcome.exported), recorder_in(tmp_path), ALONE, screen)
    summary = json.loads((tmp_path / METRICS_FOLDER / "summary.json").read_text())
    assert summary == {**SUMMARY, "exit": "completed"}
    assert (tmp_path / "report.html").is_file()
    state = read_state(tmp_path)
    assert state is not None
    assert state.outcome is Outcome.completed
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == (
        [] if keep_last == 0 else ["latest", "step-000004"]
    )
    finish(config, state, None, ALONE, screen)


def refuse_second_start(run_dir: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="another process is training"),
        locked(run_dir, ALONE, Screen()),
    ):
        pass


def test_a_second_start_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    with locked(tmp_path, ALONE, Screen()):
        refuse_second_start(tmp_path)
    with locked(tmp_path, ALONE, Screen()):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_the_host_keeps_a_second_start_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, run_dir, screen = fcntl.flock, tmp_path / "run", Screen()

    def lock(file: TextIO, operation: int) -> None:
        if Path(file.name).parent == run_dir:
            raise OSError(number, os.strerror(number))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with locked(run_dir, ALONE, screen):
        assert os.strerror(number) in screen.lines[0]
        refuse_second_start(run_dir)
    with locked(run_dir, ALONE, screen):
        pass


def test_a_run_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="run folder cannot be written"),
        locked(tmp_path / "file" / "run", ALONE, Screen()),
    ):
        pass
