"""The checkpoint and the folder of an export are found before torch is imported."""

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.schema import OptimConfig, RunConfig
from dpo_dist.config.verb_options import ExportConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.exported import find_checkpoint, find_members, find_output


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with checkpoints after steps 100 and 200, of which the first is the best."""
    run = load_run_config(["model.path=org/model", "data.train=[pairs.jsonl]", f"run.dir={tmp_path}"])
    for name in ("step-000100", "step-000200"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "best").write_text("step-000100\n")
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    return run


def named(config: RunConfig, checkpoint: str) -> RunConfig:
    return replace(config, export=ExportConfig(checkpoint=checkpoint))


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [
        ("latest", "step-000200"),
        ("best", "step-000100"),
        ("step-000100", "step-000100"),
        ("step-100", "step-000100"),
    ],
)
def test_a_checkpoint_by_name(checkpoint: str, found: str, config: RunConfig, tmp_path: Path) -> None:
    folder = find_checkpoint(named(config, checkpoint))
    assert folder == tmp_path / "checkpoints" / found
    assert find_output(config, [folder]) == tmp_path / "exported" / found
    merged = replace(config, export=ExportConfig(merge=True))
    assert find_output(merged, [folder]) == tmp_path / "exported" / f"{found}-merged"


def test_what_is_missing_is_named(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not have this checkpoint") as missing:
        find_checkpoint(named(config, "step-000300"))
    assert missing.value.expected == "step-000200, step-000100"
    (tmp_path / "checkpoints" / "best").unlink()
    with pytest.raises(ConfigError, match="no best checkpoint"):
        find_checkpoint(named(config, "best"))
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="has no checkpoint"):
        find_checkpoint(config)


def test_another_configuration_than_the_runs_is_shown_in_part(config: RunConfig) -> None:
    """As of a command line with the model of the run and no other of its keys."""
    data, trainer = replace(config.data, max_length=77), replace(config.trainer, seed=5, epochs=2)
    other = replace(config, optim=OptimConfig(lr=1e-3, eps=1e-3), data=data, trainer=trainer)
    with pytest.raises(ConfigError, match="configuration of its run") as raised:
        find_checkpoint(other)
    assert raised.value.where == "data.max_length, optim.lr, optim.eps and 2 others"
    assert raised.value.got == "77, 0.001, 0.001 and 2 others"
    assert "without model.path" in raised.value.remedy


def test_a_damaged_checkpoint_is_not_called_missing(config: RunConfig, tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints" / "step-000200"
    (newest / "state.json").unlink()
    assert find_checkpoint(config) == newest  # whose files are checked later


def test_keys_of_another_run_are_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="has the configuration of its run") as error:
        find_checkpoint(replace(config, optim=OptimConfig(lr=0.5)))
    assert error.value.where == "optim.lr"


def test_an_existing_folder_is_not_replaced(config: RunConfig, tmp_path: Path) -> None:
    given = replace(config, export=ExportConfig(output=str(tmp_path)))
    with pytest.raises(ConfigError, match="the folder to write exists"):
        find_output(given, [find_checkpoint(given)])


def test_members_of_an_average_are_model_folders(config: RunConfig, tmp_path: Path) -> None:
    folders = [tmp_path / "other" / "model", tmp_path / "model"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    averaged = replace(config, export=ExportConfig(average=[str(folder) for folder in folders]))
    assert find_members(averaged) == folders
    assert find_output(averaged, folders) == tmp_path / "exported" / "average"
    checkpoint = f"{tmp_path}/checkpoints/step-000100"
    with pytest.raises(ConfigError, match="is no model folder") as missing:
        find_members(replace(config, export=ExportConfig(average=[str(folders[0]), checkpoint])))
    assert missing.value.got == checkpoint
    with pytest.raises(ConfigError, match="named twice"):
        find_members(replace(config, export=ExportConfig(average=[str(folders[0]), f"{folders[0]}/."])))
