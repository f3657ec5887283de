"""The start of a run: lock, resume point, recorded state; and the last files of a run that was killed."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import FolderConfig, ModelConfig, Resume, RunConfig, TrainerConfig
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.foundation.errors import CheckpointError, ConfigError, RunOutcome
from dpo_dist.foundation.files import staged_file, temporary_name, write_text
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import MetricsLog
from dpo_dist.insight.metrics.trackers import Trackers
from dpo_dist.insight.recorder import Recorder
from dpo_dist.insight.verdict.rules import NOTHING_TO_JUDGE
from dpo_dist.training import start as run_start
from dpo_dist.training.finish import finish
from dpo_dist.training.resume import RunState, check_configuration, check_identity, read_state, write_state
from dpo_dist.training.start import describe_run, find_start, locked, mark_started, write_on_main
from tests.support.alone import ALONE
from tests.support.own_loss import OWN

CONFIG = RunConfig(model=ModelConfig("somewhere"))
IDENTITY = {"run_digest": run_digest(CONFIG), "data": "d", "eval_data": None, "model": "m", "reference": None}
SUMMARY: dict[str, Any] = {"final": {"loss": 0.5}, "best": {}, "steps": 4, "pairs_seen": 24}


class Screen(Console):
    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def result(self, _kind: str, _content: Any, lines: Sequence[str]) -> None:
        self.lines += lines


def config_in(folder: RunFolder, keep_last: int = 2, resume: Resume = Resume.auto) -> RunConfig:
    return replace(
        CONFIG, run=FolderConfig(str(folder), resume=resume), trainer=TrainerConfig(keep_last=keep_last)
    )


def save_checkpoint(folder: RunFolder, step: int) -> None:
    saver = CheckpointSaver(folder.checkpoints, 2, [], ALONE)
    saver.save(step, {"step": step, **IDENTITY})
    saver.commit()


def state_of(outcome: RunOutcome) -> RunState:
    return RunState(outcome, 4, dict(IDENTITY), SUMMARY if outcome is RunOutcome.exported else None)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def recorder_in(folder: RunFolder) -> Recorder:
    return Recorder(MetricsLog.open(folder, 4), Trackers(), print)


def test_the_state_is_read_as_it_was_written(folder: RunFolder) -> None:
    assert read_state(folder) is None
    for outcome in RunOutcome:
        write_state(folder, state_of(outcome))
        assert read_state(folder) == state_of(outcome)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}"),
        '{"outcome": "won", "step": 1, "identity": {}}',
    ],
)
def test_an_unreadable_state_is_an_error_and_no_fresh_start(content: str, folder: RunFolder) -> None:
    folder.state.write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_start(config_in(folder), folder, ALONE)


@pytest.mark.parametrize("outcome", [RunOutcome.exported, RunOutcome.completed])
@pytest.mark.parametrize("resume", [Resume.auto, Resume.must])
def test_a_run_with_a_written_model_is_finished_even_without_checkpoints(
    outcome: RunOutcome, resume: Resume, folder: RunFolder
) -> None:
    write_state(folder, state_of(outcome))
    folder.model.mkdir()
    (folder.model / "model.safetensors").touch()
    start = find_start(config_in(folder, resume=resume), folder, ALONE)
    assert start.finished == state_of(outcome)
    assert start.checkpoint is None


@pytest.mark.parametrize("emptied", [False, True])
def test_a_complete_run_without_its_model_resumes_from_a_checkpoint_or_is_an_error(
    emptied: bool, folder: RunFolder
) -> None:
    write_state(folder, state_of(RunOutcome.completed))
    if emptied:
        folder.model.mkdir()
    with pytest.raises(CheckpointError, match="its model and its checkpoints were removed"):
        find_start(config_in(folder), folder, ALONE)
    save_checkpoint(folder, 4)
    start = find_start(config_in(folder), folder, ALONE)
    assert start.finished is None
    assert start.checkpoint is not None
    assert start.checkpoint.state["step"] == 4


@pytest.mark.parametrize("outcome", [None, RunOutcome.started, RunOutcome.preempted])
def test_a_fresh_start_never_replaces_a_model(outcome: RunOutcome | None, folder: RunFolder) -> None:
    if outcome is not None:
        write_state(folder, replace(state_of(outcome), step=0))
    assert find_start(config_in(folder), folder, ALONE).checkpoint is None
    folder.model.mkdir()
    with pytest.raises(CheckpointError, match="move model/ away"):
        find_start(config_in(folder), folder, ALONE)


@pytest.mark.parametrize("name", [name for name in IDENTITY if name != "run_digest"])
def test_changed_inputs_are_refused_by_name(name: str, folder: RunFolder) -> None:
    check_identity({**IDENTITY, "step": 4}, IDENTITY, folder.state)
    for recorded in ({**IDENTITY, name: "former"}, {k: v for k, v in IDENTITY.items() if k != name}):
        if recorded.get(name) != IDENTITY[name]:
            with pytest.raises(CheckpointError) as caught:
                check_identity(recorded, IDENTITY, folder.state)
            assert name.replace("eval_data", "evaluation data") in caught.value.message


def test_another_configuration_is_refused_with_the_keys_that_differ(folder: RunFolder) -> None:
    command = ["model.path=m", "data.train=[a.jsonl]", f"run.dir={folder}"]
    former = load_run_config(command)
    other = load_run_config([*command, "data.train=[b.jsonl]", "loss.beta=0.2", "trainer.log_every=7"])
    recorded = {"run_digest": run_digest(former), "step": 4}
    check_configuration(recorded, former, folder)
    with pytest.raises(CheckpointError) as caught:
        check_configuration(recorded, other, folder)
    assert caught.value.expected == f"digest {recorded['run_digest']}", "there is no config.yaml"
    folder.config.write_text(to_yaml(former))
    with pytest.raises(CheckpointError, match="belongs to another configuration") as caught:
        check_configuration(recorded, other, folder)
    assert caught.value.where == str(folder.config)
    assert caught.value.got == "data.train=[{'path': 'b.jsonl'}], loss.beta=0.2"
    assert caught.value.expected == "data.train=[{'path': 'a.jsonl'}], loss.beta=0.1"


def test_a_start_removes_the_summary_of_an_earlier_one(folder: RunFolder) -> None:
    recorder_in(folder).close({**SUMMARY, "exit": "preempted"})
    assert ">preempted<" in folder.report.read_text()
    (folder.path / "model.tmp-0123456789ab").mkdir()
    mark_started(folder, state_of(RunOutcome.started), ALONE, Screen())
    assert read_state(folder) == state_of(RunOutcome.started)
    assert not folder.summary.exists()
    assert ">preempted<" not in folder.report.read_text()
    assert not list(folder.path.glob("model.*"))


def test_a_bug_in_the_report_stops_no_resumed_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_folder: RunFolder) -> None:
        raise RuntimeError("a bug")

    recorder_in(folder).close({**SUMMARY, "exit": "preempted"})
    monkeypatch.setattr(run_start, "write_page", broken)
    screen = Screen()
    mark_started(folder, state_of(RunOutcome.started), ALONE, screen)
    assert read_state(folder) == state_of(RunOutcome.started)
    [warning] = screen.lines
    assert warning.startswith("warning: report.html is missing because of a bug")


@pytest.mark.parametrize("keep_last", [0, 1])
def test_the_report_of_a_run_that_was_killed_before_it_is_written(keep_last: int, folder: RunFolder) -> None:
    save_checkpoint(folder, 4)
    config, screen = config_in(folder, keep_last), Screen()
    finish(config, state_of(RunOutcome.exported), recorder_in(folder), ALONE, screen)
    summary = json.loads(folder.summary.read_text())
    assert summary.pop("verdict") == {"sentence": NOTHING_TO_JUDGE, "findings": []}
    assert summary == {**SUMMARY, "exit": "completed"}
    assert folder.report.is_file()
    state = read_state(folder)
    assert state is not None
    assert state.outcome is RunOutcome.completed
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == (
        [] if keep_last == 0 else ["latest", "step-000004"]
    )
    finish(config, state, None, ALONE, screen)


def test_deleted_files_of_a_completed_run_are_written_again(folder: RunFolder) -> None:
    recorder, screen = recorder_in(folder), Screen()
    recorder.record({"step": 4, "loss": 0.5})
    finish(config_in(folder), state_of(RunOutcome.exported), recorder, ALONE, screen)
    state = read_state(folder)
    assert state is not None
    files = [folder.summary, folder.log_history, folder.metrics_table]
    before = {file: file.read_text() for file in files}
    for lost in ((folder.summary, folder.report), (folder.log_history,), (folder.metrics_table,)):
        for file in lost:
            file.unlink()
        finish(config_in(folder), state, None, ALONE, screen)
        assert folder.report.is_file()
        assert {file: file.read_text() for file in files} == before
        assert f"written again: {', '.join(file.name for file in lost)}" in screen.lines


@pytest.mark.parametrize(
    ("report", "sentence", "warns"),
    [
        ('{"findings": [{"rule": "doubled_bos", "level": "error"}]}', "faults in the data", False),
        ("{}", NOTHING_TO_JUDGE, True),
        ("", NOTHING_TO_JUDGE, True),
    ],
)
def test_the_verdict_reads_the_findings_of_the_doctor(
    report: str, sentence: str, warns: bool, folder: RunFolder
) -> None:
    write_text(folder.doctor_report, report)
    save_checkpoint(folder, 4)
    screen = Screen()
    finish(config_in(folder), state_of(RunOutcome.exported), recorder_in(folder), ALONE, screen)
    assert json.loads(folder.summary.read_text())["verdict"]["sentence"].startswith(sentence)
    assert any(line.startswith(f"verdict: {sentence}") for line in screen.lines)
    assert any("the verdict ignores" in line for line in screen.lines) is warns


def check_second_start_refused(folder: RunFolder) -> None:
    with (
        pytest.raises(ConfigError, match="another process is training"),
        locked(folder, ALONE),
    ):
        pass


def test_a_second_start_is_refused_until_the_first_ends(folder: RunFolder) -> None:
    with locked(folder, ALONE):
        check_second_start_refused(folder)
    with locked(folder, ALONE):
        pass


def test_ranks_with_different_sources_of_a_loss_function_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, loss=LossConfig(LossKind.custom, function=OWN))
    assert describe_run(config, ALONE)["loss_function"].startswith(f"custom loss {OWN}")
    monkeypatch.setattr(type(ALONE), "gather", lambda _, digest: [digest, "0" * 8])
    with pytest.raises(ConfigError, match="different sources") as caught:
        describe_run(config, ALONE)
    assert "rank 1: 00000000" in caught.value.got


def test_a_run_directory_that_was_moved_away_is_not_made_again(folder: RunFolder, tmp_path: Path) -> None:
    moved = RunFolder(tmp_path / "moved away")
    with pytest.raises(CheckpointError, match="a file of the run cannot be written"):
        write_on_main(lambda: write_state(moved, state_of(RunOutcome.started)), moved, ALONE)
    assert not moved.path.exists()


def test_temporaries_of_a_killed_start_are_removed(folder: RunFolder) -> None:
    """A start that was killed while it wrote a single file."""
    files = folder.state, folder.summary, folder.samples_file(2), folder.bad_step(3), folder.wandb_id
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    of_killed = [temporary_name(file) for file in files]
    for file in of_killed:
        file.touch()
        os.utime(file, (0, 0))
    with staged_file(folder.samples_file(3)) as own, locked(folder, ALONE):
        assert own.exists(), "this process still writes it"
        assert [file.exists() for file in of_killed] == [False] * 5
        own.touch()
