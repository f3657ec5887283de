"""Paths of the run directory are part of the public contract."""

from pathlib import Path

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import FolderConfig, RunConfig


def test_the_paths_of_a_run_directory_are_those_of_the_contract() -> None:
    folder = RunFolder.of(RunConfig(run=FolderConfig("output/run")))
    assert str(folder) == "output/run"
    paths = [value for name in dir(RunFolder) if isinstance(value := getattr(folder, name), Path)]
    assert {str(path.relative_to("output/run")) for path in [*paths, folder.rank_log(1)]} == {
        *("config.yaml", "environment.json", "run_state.json", ".lock", "logs", "logs/rank-1.log"),
        *("dpo_metrics", "dpo_metrics/log_history.json", "dpo_metrics/training_metrics.csv"),
        *("dpo_metrics/summary.json", "dpo_metrics/training_curves.png", "report.html"),
        *("checkpoints", "model", "wandb/run_id.txt"),
    }
