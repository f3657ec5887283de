"""Variables that W&B's users set are used where the configuration leaves a value unset."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig, TrackingConfig, WandbMode
from dpo_dist.insight.metrics.wandb import open_tracker, wanted_mode
from dpo_dist.insight.metrics.wandb_file import read_records

pytestmark = pytest.mark.usefixtures("own_wandb")

VARIABLES = {
    "WANDB_PROJECT": "their project",
    "WANDB_ENTITY": "their-team",
    "WANDB_NAME": "their name",
    "WANDB_RUN_GROUP": "their group",
    "WANDB_TAGS": "one,two",
    "WANDB_NOTES": "their notes",
}


def config_of(**tracking: Any) -> RunConfig:
    return RunConfig(tracking=TrackingConfig(**{"wandb": WandbMode.offline, **tracking}))


def runs_of(config: RunConfig, run_dir: Path) -> list[Any]:
    tracker = open_tracker(config, RunFolder(run_dir), lambda: None)
    assert tracker is not None
    tracker.finish("completed", {"verdict": {"sentence": "learnt little"}})
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return [record.run for record in read_records(file) if record.WhichOneof("record_type") == "run"]


def test_unset_values_are_those_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    first, *_, last = runs_of(config_of(), tmp_path)
    assert (first.project, first.entity, first.display_name) == ("their project", "their-team", "their name")
    assert (first.run_group, list(first.tags), first.notes) == ("their group", ["one", "two"], "their notes")
    assert last.notes == "their notes\n\nVerdict: learnt little"


def test_the_configuration_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**VARIABLES, "WANDB_MODE": "online", "WANDB_DIR": "/elsewhere"}.items():
        monkeypatch.setenv(name, value)
    run, *_ = runs_of(config_of(project="p"), tmp_path)
    assert run.project == "p"
    assert run.display_name == "their name"


def test_without_either_the_project_is_dpo_dist(tmp_path: Path) -> None:
    run, *_ = runs_of(config_of(), tmp_path)
    assert (run.project, list(run.tags), run.notes) == ("dpo_dist", [], "")


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        ("", "auto"),
        ("online", "online"),
        ("offline", "offline"),
        ("dryrun", "offline"),
        ("disabled", "off"),
        ("shared", "auto"),
    ],
)
def test_modes(monkeypatch: pytest.MonkeyPatch, value: str, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", value)
    assert wanted_mode(config_of(wandb=WandbMode.auto)) == mode
