"""The checkpoint and the folder of an export are found before torch is imported."""

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.schema import OptimConfig, RunConfig
from dpo_dist.config.verb_options import ExportConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.exported import find_checkpoint, find_output, find_sources


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
    assert find_sources(named(config, checkpoint)) == [folder]
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


def test_members_of_an_average_may_be_named_without_zeros(config: RunConfig, tmp_path: Path) -> None:
    average = replace(config, export=ExportConfig(average=["step-100", "step-000200"]))
    assert [folder.name for folder in find_sources(average)] == ["step-000100", "step-000200"]


def test_a_member_by_two_names_is_one_member_twice(config: RunConfig, tmp_path: Path) -> None:
    own = f"{tmp_path}/checkpoints/step-000100"
    for twice in (["step-100", "step-000100"], ["step-000100", "step-000200", own]):
        with pytest.raises(ConfigError, match="named twice"):
            find_sources(replace(config, export=ExportConfig(average=twice)))


def test_a_damaged_checkpoint_is_not_called_missing(config: RunConfig, tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints" / "step-000200"
    (newest / "state.json").unlink()
    assert find_checkpoint(config) == newest  # whose files are checked later
    members = replace(config, export=ExportConfig(average=["step-000100", "step-000200"]))
    assert find_sources(members) == [newest.with_name("step-000100"), newest]


@pytest.mark.parametrize(
    ("other", "is_same"), [("{r: 4}", True), ("{r: 4, alpha: 64}", False), ("{r: 4, init: pissa}", False)]
)
def test_a_checkpoint_of_another_run_has_the_same_adapter(
    other: str, is_same: bool, config: RunConfig, tmp_path: Path
) -> None:
    command = ["model.path=org/model", "data.train=[pairs.jsonl]"]
    own = load_run_config([*command, "model.adapter={r: 4}", f"run.dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(to_yaml(own))
    member = tmp_path / "second" / "checkpoints" / "step-000300"
    member.mkdir(parents=True)
    (member / "state.json").write_text("{}")
    averaged = replace(own, export=ExportConfig(average=["step-000100", str(member)]))
    with pytest.raises(ConfigError, match="the run of a member of the average cannot be read"):
        find_sources(averaged)
    run = load_run_config([*command, f"model.adapter={other}", f"run.dir={tmp_path}/second"])
    (tmp_path / "second" / "config.yaml").write_text(to_yaml(run))
    if is_same:
        assert find_sources(averaged)[1] == member
    else:
        with pytest.raises(ConfigError, match="of another kind of adapter"):
            find_sources(averaged)


def test_a_checkpoint_of_an_earlier_version_has_the_same_adapter(config: RunConfig, tmp_path: Path) -> None:
    command = ["model.path=org/model", "data.train=[pairs.jsonl]", "model.adapter={path: sft}"]
    member = tmp_path / "second" / "checkpoints" / "step-000300"
    member.mkdir(parents=True)
    (member / "state.json").write_text("{}")
    runs = [load_run_config([*command, f"run.dir={folder}"]) for folder in (tmp_path, tmp_path / "second")]
    (tmp_path / "config.yaml").write_text(to_yaml(runs[0]))
    former = to_yaml(runs[1]).replace("    init: null\n", "    init: default\n")
    (tmp_path / "second" / "config.yaml").write_text(former)
    averaged = replace(runs[0], export=ExportConfig(average=["step-000100", str(member)]))
    assert find_sources(averaged)[1] == member


def test_keys_of_another_run_are_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="has the configuration of its run") as error:
        find_checkpoint(replace(config, optim=OptimConfig(lr=0.5)))
    assert error.value.where == "optim.lr"


def test_an_existing_folder_is_not_replaced(config: RunConfig, tmp_path: Path) -> None:
    given = replace(config, export=ExportConfig(output=str(tmp_path)))
    with pytest.raises(ConfigError, match="the folder to write exists"):
        find_output(given, [find_checkpoint(given)])


def test_members_of_an_average_by_name_or_folder(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "other" / "model").mkdir(parents=True)
    (tmp_path / "other" / "model" / "config.json").write_text("{}")
    members = ["step-000200", "step-000100", f"{tmp_path}/other/model"]
    averaged = replace(config, export=ExportConfig(average=members))
    checkpoints = tmp_path / "checkpoints"
    found = [checkpoints / "step-000200", checkpoints / "step-000100", tmp_path / "other/model"]
    assert find_sources(averaged) == found
    assert find_output(averaged, found) == tmp_path / "exported" / "average"
    absent = replace(config, export=ExportConfig(average=["step-000200", "step-000300"]))
    with pytest.raises(ConfigError, match="neither a checkpoint nor a model") as missing:
        find_sources(absent)
    assert missing.value.got == "step-000300"
