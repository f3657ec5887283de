"""A run is continued to a greater length, and to nothing else."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.checkpoint import CheckpointSaver
from dpo_dist.foundation.errors import CheckpointError, RunOutcome
from dpo_dist.training.resume import (
    RunState,
    check_newest_checkpoint,
    describe_change,
    length_of,
    write_state,
)
from dpo_dist.training.start import Start, find_start
from tests.support.alone import ALONE


def run_of(folder: Path, *options: str) -> RunConfig:
    return load_run_config(["model.path=m", "data.train=[a.jsonl]", f"run.dir={folder}", *options])


def complete(config: RunConfig, *, has_checkpoint: bool = True) -> None:
    """A complete run of 8 steps."""
    folder = RunFolder.of(config)
    identity: dict[str, Any] = {"run_digest": run_digest(config), "length": length_of(config)}
    folder.model.mkdir(parents=True)
    (folder.model / "model.safetensors").touch()
    folder.config.write_text(to_yaml(config))
    write_state(folder, RunState(RunOutcome.completed, 8, identity))
    if has_checkpoint:
        saver = CheckpointSaver(folder.checkpoints, 2, [], ALONE)
        saver.save(8, {"step": 8, "steps": 8, "pairs_seen": 500, **identity})
        saver.commit()


def start_of(config: RunConfig) -> Start:
    return find_start(config, RunFolder.of(config), ALONE)


@pytest.mark.parametrize(
    ("former", "new"),
    [
        ([], ["trainer.epochs=2"]),
        ([], ["trainer.max_steps=9"]),
        (["trainer.max_steps=8"], ["trainer.max_steps=9"]),
    ],
)
def test_a_complete_run_continues_to_a_greater_length(
    former: list[str], new: list[str], tmp_path: Path
) -> None:
    config = run_of(tmp_path, *former)
    complete(config)
    assert start_of(config).finished is not None
    longer = start_of(run_of(tmp_path, *new))
    assert longer.finished is None
    assert longer.step == 8


def test_a_start_that_was_killed_before_its_first_checkpoint_continues(tmp_path: Path) -> None:
    """Its config.yaml and run_state.json have the new length, its checkpoint has the former."""
    complete(run_of(tmp_path))
    longer = run_of(tmp_path, "trainer.epochs=2")
    folder = RunFolder.of(longer)
    folder.config.write_text(to_yaml(longer))
    write_state(folder, RunState(RunOutcome.started, 8, {"run_digest": run_digest(longer)}))
    assert start_of(longer).step == 8


@pytest.mark.parametrize(
    ("former", "new"),
    [
        (["trainer.epochs=2"], ["trainer.epochs=1"]),
        ([], ["trainer.max_steps=8"]),
        ([], ["trainer.max_steps=3"]),
        (["trainer.max_steps=8"], ["trainer.max_steps=7"]),
        (["trainer.max_steps=8"], ["trainer.epochs=4"]),
    ],
)
def test_a_run_does_not_become_shorter(former: list[str], new: list[str], tmp_path: Path) -> None:
    complete(run_of(tmp_path, *former))
    with pytest.raises(CheckpointError, match="to a greater length only") as error:
        start_of(run_of(tmp_path, *new))
    assert error.value.expected.endswith(", 8 steps")


def test_another_key_is_refused_beside_a_greater_length(tmp_path: Path) -> None:
    complete(run_of(tmp_path))
    for is_finished in (True, False):
        other = run_of(tmp_path, "trainer.epochs=2", "optim.lr=0.5")
        if is_finished:
            assert start_of(other).finished is not None, "which `train` then refuses"
            RunFolder.of(other).state.unlink()
        else:
            with pytest.raises(CheckpointError, match="belongs to another configuration"):
                start_of(other)


def test_without_a_checkpoint_a_run_cannot_become_longer(tmp_path: Path) -> None:
    complete(run_of(tmp_path), has_checkpoint=False)
    with pytest.raises(CheckpointError, match="no checkpoint from which it could continue"):
        start_of(run_of(tmp_path, "trainer.epochs=2"))


def test_the_line_about_another_length_names_a_partial_batch() -> None:
    config, state = run_of(Path("run")), {"step": 8, "steps": 8, "pairs_seen": 500}
    assert describe_change(state, config, 8) == ""
    line = describe_change(state, config, 16)
    assert line.startswith("training longer: 16 steps in place of 8; ")
    assert line.endswith("the next 12 pairs of the order are not trained")


def test_before_processes_join_only_runs_that_cannot_continue_are_refused(tmp_path: Path) -> None:
    complete(run_of(tmp_path, "trainer.epochs=2"))
    for options in (["trainer.epochs=2"], ["trainer.epochs=3"], ["trainer.max_steps=9"]):
        check_newest_checkpoint(run_of(tmp_path, *options, "parallelism.kind=ddp"))
    for refused, words in (
        ("trainer.epochs=1", "greater length only"),
        ("optim.lr=0.5", "another configuration"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_newest_checkpoint(run_of(tmp_path, refused))
        check_newest_checkpoint(run_of(tmp_path, refused, "run.resume=never"))
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    check_newest_checkpoint(run_of(moved, "trainer.epochs=2"))
    (moved / "checkpoints/step-000008/state.json").write_text("{")
    check_newest_checkpoint(run_of(moved, "optim.lr=0.5"))
