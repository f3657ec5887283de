"""`run.after_checkpoint`: a command of the user, behind the training."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dpo_dist.training.after_checkpoint as module
from dpo_dist.config.load import load_run_config
from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.distributed.checkpoint.saver import CheckpointSaver
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.after_checkpoint import AfterCheckpoint
from tests.support.alone import ALONE
from tests.support.one_weight import Weights

pytestmark = pytest.mark.slow

UNTIL_GO = "for i in $(seq 1200); do [ -e go ] && break; sleep 0.05; done"
"""Waits a minute at most: a test that fails leaves no loop behind."""


class Commands:
    """The commands of a run in `folder`, and the lines of its console."""

    def __init__(self, folder: Path, command: str):
        self.folder = folder
        self.end_deleting: Callable[[], object] = lambda: None
        self.lines = list[str]()
        self.command = AfterCheckpoint(command, RunFolder(folder), Console(LineScreen(self.lines.append)))

    def start(self, step: int) -> None:
        self.command.start(RunFolder(self.folder).checkpoint(step), self.end_deleting)

    def end(self, *, is_stopping: bool = False) -> str:
        self.command.finish(lambda: is_stopping)
        return "\n".join(self.lines)

    def written(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().split() if file.exists() else []


def wait_for(is_done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_command_gets_its_checkpoint_and_run_and_no_place_in_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("BUCKET", "b")
    said = "$DPO_DIST_CHECKPOINT $DPO_DIST_RUN_DIR $BUCKET "
    said += "${RANK-no}${WORLD_SIZE-no}${ACCELERATE_MIXED_PRECISION-no}"
    commands = Commands(Path(tmp_path.name), f'echo "{said}" > $DPO_DIST_RUN_DIR/said; cat')
    commands.start(7)
    assert commands.end() == ""
    run = tmp_path.parent / tmp_path.name
    assert commands.written("said") == [f"{run}/checkpoints/step-000007", str(run), "b", "nonono"]


def test_checkpoints_wait_for_a_command_and_the_newest_of_them_is_next(tmp_path: Path) -> None:
    name = 'basename "$DPO_DIST_CHECKPOINT"'
    commands = Commands(
        tmp_path,
        f"cd $DPO_DIST_RUN_DIR; {name} >> begun; {UNTIL_GO}; {name} >> done",
    )
    began = time.monotonic()
    commands.start(1)
    wait_for(lambda: commands.written("begun"))
    for step in (2, 3, 4):
        commands.start(step)
    assert time.monotonic() - began < 240
    assert commands.written("begun") == ["step-000001"]
    assert commands.written("done") == []
    (tmp_path / "go").touch()
    assert commands.end() == ""
    assert commands.written("begun") == commands.written("done") == ["step-000001", "step-000004"]
    commands.start(5)
    commands.end()
    assert commands.written("done")[-1] == "step-000005", "a command that comes after a pause"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo first; echo 'no such bucket' >&2; exit 7", "step-000001: exit status 7: no such bucket"),
        ("printf '10 %%\\r20 %%\\n\\n'; false", "step-000001: exit status 1: 20 %"),
        ("exit 3", "step-000001: exit status 3"),
        ("kill -9 $$", "step-000001: SIGKILL"),
        ("printf '\\377\\n'; exit 1", "exit status 1: \ufffd"),
        ("no-such-program-anywhere", "exit status 127: "),
        ("echo denied: --token $SOME_TOKEN; exit 9", "exit status 9: denied: --token ***"),
        ("a\0b", "null byte"),
    ],
)
def test_a_failure_is_a_warning_with_its_status_and_last_line(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-canary")
    commands = Commands(tmp_path, command)
    commands.start(1)
    line = commands.end()
    assert line.startswith("warning: run.after_checkpoint failed for step-000001: ")
    assert said in line
    assert "canary" not in line
    commands.start(2)
    assert "step-000002" in commands.end(), "the next checkpoint has a command again"


def test_a_run_waits_for_the_command_of_its_last_checkpoint(tmp_path: Path) -> None:
    commands = Commands(tmp_path, "sleep 0.5; touch $DPO_DIST_RUN_DIR/done-$(basename $DPO_DIST_CHECKPOINT)")
    commands.start(1)
    commands.start(2)
    assert commands.end() == ""
    assert (tmp_path / "done-step-000002").exists()


def test_a_process_that_a_command_leaves_behind_holds_nothing(tmp_path: Path) -> None:
    commands = Commands(tmp_path, "sleep 200 &")
    commands.start(1)
    began = time.monotonic()
    assert commands.end() == ""
    assert time.monotonic() - began < 150


@pytest.mark.parametrize("command", ["sleep 500; echo over", "trap '' TERM; echo busy; sleep 500; sleep 500"])
def test_a_run_that_is_stopped_ends_the_command_after_a_while(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STOP_SECONDS", 1.0)
    monkeypatch.setattr(module, "_KILL_SECONDS", 0.5)
    commands = Commands(tmp_path, f"echo $$ > $DPO_DIST_RUN_DIR/pid; {command}")
    commands.start(1)
    wait_for(lambda: commands.written("pid"))
    commands.start(2)
    began = time.monotonic()
    lines = commands.end(is_stopping=True)
    assert 1 <= time.monotonic() - began < 240
    assert "step-000001: still running 1 s after the request to stop, and ended" in lines
    assert "step-000002: the run was asked to stop" in lines, "none is left out in silence"
    pid = commands.written("pid")[0]
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_a_short_command_is_waited_for_when_the_run_is_stopped(tmp_path: Path) -> None:
    commands = Commands(tmp_path, "sleep 0.5; touch $DPO_DIST_RUN_DIR/done")
    commands.start(1)
    assert commands.end(is_stopping=True) == ""
    assert (tmp_path / "done").exists()


def test_the_checkpoint_of_a_running_command_is_not_deleted(tmp_path: Path) -> None:
    commands = Commands(tmp_path, f"cd $DPO_DIST_RUN_DIR; {UNTIL_GO}")
    folder = RunFolder(tmp_path)
    weights = Weights()
    saver = CheckpointSaver(
        folder.checkpoints, 1, [weights], ALONE, committed=commands.start, in_use=commands.command.in_use
    )
    commands.end_deleting = saver.end_deleting

    def save(step: int) -> list[str]:
        saver.save(step, {"step": step})
        saver.commit()
        saver.save(step + 1, {"step": step + 1})  # waits until others are deleted
        return [path.name for path in checkpoint_folders(folder.checkpoints)]

    assert save(1) == ["step-000001"]
    wait_for(commands.command.in_use)
    assert save(3) == ["step-000003", "step-000001"]
    (tmp_path / "go").touch()
    commands.end()
    assert not commands.command.in_use()
    # The command for step 4, which began just now, may still run.
    assert {"step-000001", "step-000003"}.isdisjoint(save(5))
    saver.close()


RUN = ("model.path=m", "data.train=[a]")


def test_the_command_is_not_part_of_a_runs_digest() -> None:
    plain = load_run_config(RUN)
    copied = load_run_config([*RUN, "run.after_checkpoint=aws s3 sync $DPO_DIST_RUN_DIR s3://b/r"])
    assert plain.identity.digest == copied.identity.digest
    assert copied.run.after_checkpoint == "aws s3 sync $DPO_DIST_RUN_DIR s3://b/r"


@pytest.mark.parametrize("command", ["curl --token *** x", r"'echo \${HOME}'"])
def test_a_command_of_which_the_configuration_keeps_another_text_is_refused(command: str) -> None:
    with pytest.raises(ConfigError, match=r"the command has \*\*\* or \$\{") as raised:
        load_run_config([*RUN, f"run.after_checkpoint={command}"])
    assert "write $NAME" in raised.value.remedy
