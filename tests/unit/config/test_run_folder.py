"""Paths of the run directory are part of the public contract; checkpoints are ordered by their steps."""

from pathlib import Path

import pytest

from dpo_dist.config.run_folder import (
    STATE,
    RunFolder,
    checkpoint_folders,
    checkpoint_name,
    checkpoint_step,
    existing_run,
    is_checkpoint,
    strip_key,
)
from dpo_dist.config.schema import FolderConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.pairs.folder import PairsFolder
from dpo_dist.tools.sweep.folder import SweepFolder

FOLDER = RunFolder(FolderConfig("output/run").path)


def test_the_paths_of_a_run_directory_are_those_of_the_contract() -> None:
    assert str(FOLDER) == "output/run"
    folders = [
        kind(FOLDER.path) for kind in (RunFolder, ComparisonFolder, DoctorFolder, PairsFolder, SweepFolder)
    ]
    values = [getattr(folder, name) for folder in folders for name in dir(folder)]
    paths = [value for value in values if isinstance(value, Path) and value != FOLDER.path]
    paths += [FOLDER.rank_log(1), *FOLDER.evaluation.files, FOLDER.last_evaluation.results]
    assert {str(path.relative_to("output/run")) for path in paths} == {
        *("config.yaml", "environment.json", "run_state.json", ".lock", "logs", "logs/rank-1.log"),
        *("dpo_metrics", "dpo_metrics/log_history.json", "dpo_metrics/training_metrics.csv"),
        *("dpo_metrics/summary.json", "dpo_metrics/training_curves.png", "report.html"),
        *("checkpoints", "model", "exported", "wandb/run_id.txt", "tensorboard", "trackers"),
        *("samples", "samples/reference.jsonl"),
        *("comparison", "comparison/answers.jsonl", "comparison/comparison.json"),
        *("comparison/comparison.html", "comparison/parts", "comparison/models"),
        *("evaluation/evaluation.json", "evaluation/scores.jsonl"),
        *("evaluation/evaluated.json", "evaluation/training/evaluation.json"),
        *("doctor/doctor.json", "doctor/doctor.html"),
        *("pairs", "pairs/pairs.jsonl", "pairs/samples.jsonl", "pairs/parts"),
        *("pairs/judgements.jsonl", "pairs/agreement.json"),
        "sweep.json",
        *("rounds", "rounds/config.yaml", "rounds/rounds.json", "round.json", "policy"),
    }


def test_checkpoints_are_folders_with_the_name_and_the_state_of_one(tmp_path: Path) -> None:
    """The newest first, which is that of the largest step."""
    for step in (999_999, 1_000_000, 5):
        (tmp_path / checkpoint_name(step)).mkdir()
    for name in ("step-000005", "step-000009.tmp-1", "step-x"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / STATE).write_text("{}")
    (tmp_path / "step-2000000").write_text("a file")
    found = [folder.name for folder in checkpoint_folders(tmp_path)]
    assert found == ["step-1000000", "step-999999", "step-000005"]
    assert checkpoint_folders(tmp_path / "missing") == []
    assert [path.name for path in tmp_path.iterdir() if is_checkpoint(path)] == ["step-000005"]
    assert (checkpoint_step("step-000100"), checkpoint_step("step-1000000"), checkpoint_step("last")) == (
        100,
        1_000_000,
        None,
    )


def test_a_path_may_be_written_with_its_key() -> None:
    words = ("output/a=b", "run.dir=output/a=b", "run_dir=output/a=b", "model.path=output/a=b")
    assert {strip_key(word) for word in words} == {"output/a=b"}


@pytest.mark.parametrize("inside", ["model", "checkpoints/step-000002", "report.html"])
def test_a_path_inside_a_run_directory_is_answered_by_the_run(inside: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        existing_run(tmp_path / "run" / inside)
    assert caught.value.remedy == f"name one run, such as {tmp_path / 'run'}"
