"""Checkpoints are found by their names and ordered by their steps, also those of long runs."""

from pathlib import Path

from dpo_dist.config.run_folder import (
    STATE,
    checkpoint_folders,
    checkpoint_name,
    is_checkpoint,
    step_of,
)


def test_the_newest_checkpoint_is_that_of_the_largest_step(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        (tmp_path / checkpoint_name(step)).mkdir()
    (tmp_path / "step-000009.tmp-1").mkdir()
    (tmp_path / "step-2000000").write_text("a file")
    found = [folder.name for folder in checkpoint_folders(tmp_path)]
    assert found == ["step-1000000", "step-999999", "step-000005"]
    assert checkpoint_folders(tmp_path / "missing") == []


def test_a_checkpoint_has_the_name_and_the_state_of_one(tmp_path: Path) -> None:
    for name in ("step-000001", "step-x", "step-000002"):
        (tmp_path / name).mkdir()
    for name in ("step-000001", "step-x"):
        (tmp_path / name / STATE).write_text("{}")
    assert [is_checkpoint(tmp_path / name) for name in ("step-000001", "step-x", "step-000002")] == [
        *(True, False, False)
    ]
    assert (step_of("step-000100"), step_of("step-1000000"), step_of("last")) == (100, 1_000_000, None)
