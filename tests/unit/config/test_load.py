"""Overrides compose to one typed, frozen run, or to an error that names the correct key or value."""

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import config_dir, from_yaml, load_run_config, to_yaml
from dpo_dist.config.losses import LossConfig, LossKind, LossTermConfig
from dpo_dist.config.schema import NO_MODEL, Dtype, Offload, ReferenceMode, TrainerConfig
from dpo_dist.foundation.errors import ConfigError
from tests.support.own_loss import OWN

ROOT = Path(__file__).parents[3]
RUN = ["model.path=m", "data.train=[a.jsonl]"]
GROUPS = sorted(
    (file.parent.name, file.stem)
    for file in config_dir().glob("*/*.yaml")
    if file.parent.name != "experiment"
)
EXPERIMENTS = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))
Verb = Callable[..., subprocess.CompletedProcess[str]]


def error_of(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*RUN, *overrides])
    return caught.value


def test_overrides_win_over_the_experiment() -> None:
    config = load_run_config(["+experiment=qwen7b", "loss.beta=0.2", "optim.lr=5e-6", "model.dtype=fp32"])
    assert (config.loss.beta, config.optim.lr, config.model.dtype) == (0.2, 5e-6, Dtype.fp32)
    assert (config.model.path, config.reference.offload) == ("Qwen/Qwen2.5-7B", Offload.cpu)
    assert config.trainer.global_batch_pairs == 128


def test_experiments_can_be_stacked() -> None:
    config = load_run_config(["+experiment=[qwen7b,smoke]"])
    assert (config.model.path, config.trainer.max_steps) == ("Qwen/Qwen2.5-7B", 4)


def test_sources_are_typed_in_both_notations() -> None:
    config = load_run_config(["model.path=m", "data.train=[a.jsonl,{path: b, limit: 5, weight: 2}]"])
    assert config.data.train == [SourceConfig("a.jsonl"), SourceConfig("b", limit=5, weight=2.0)]


def test_terms_are_typed() -> None:
    config = load_run_config([*RUN, "loss.terms=[{kind: sigmoid},{kind: sft, weight: 0.1}]"])
    assert config.loss.terms == [LossTermConfig(LossKind.sigmoid), LossTermConfig(LossKind.sft, 0.1)]


def test_the_run_is_frozen() -> None:
    config = load_run_config(RUN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.loss.beta = 1.0  # type: ignore[misc]


def test_shared_folders_follow_the_root() -> None:
    config = load_run_config([*RUN, "run.root=/scratch/me"])
    assert (config.data.cache, config.reference.store) == ("/scratch/me/encoded", "/scratch/me/reference")


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_preset_composes(group: str, name: str) -> None:
    needed = [override for override in RUN if not override.startswith(group)]
    required = {"none": ["loss=sft"], "adapter": ["model.adapter={r: 8}"]}
    further = required.get(name, []) if group == "reference" else []
    further = [f"loss.function={OWN}"] if name == "custom" else further
    config = load_run_config([*needed, *further, f"{group}={name}"])
    if group == "loss":
        kinds = [LossKind.sigmoid, LossKind.sft] if name == "sigmoid_sft" else [LossKind[name]]
        assert list(config.loss.kinds) == kinds


def test_every_loss_has_a_preset() -> None:
    presets = {name for group, name in GROUPS if group == "loss"}
    assert set(LossKind.__members__) <= presets
    assert presets - set(LossKind.__members__) == {"sigmoid_sft"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    alone = experiment != "smoke"
    assert load_run_config([*([] if alone else RUN), f"+experiment={experiment}"]).run.name != "run"


@pytest.mark.parametrize(
    "overrides",
    [
        ["+experiment=qwen7b"],
        [*RUN, "tracking=off", "compare.models=['on','1']"],
        [*RUN, "loss.terms=[{kind: ipo}]", "trainer.max_seconds=1.5", "run.dir=/x/y"],
    ],
)
def test_written_configuration_reads_back_equal(overrides: list[str]) -> None:
    config = load_run_config(overrides)
    assert from_yaml(to_yaml(config)) == config


# Mistakes


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.beta=abc", "a number"),
        ("loss.beta=true", "a number"),
        ("loss.beta=null", "a number"),
        ("trainer.max_steps=1.5", "a whole number or null"),
        ("model.gradient_checkpointing=maybe", "none, full, or a whole number"),
        ("model.gradient_checkpointing=1", "none, full, or a whole number"),
        ("loss.router.aux_coefficient=own", "model, a number above 0, or null"),
        ("loss.router.aux_coefficient=0", "model, a number above 0, or null"),
        ("model.trust_remote_code=maybe", "true or false"),
        ("data.train=a.jsonl", "a list in brackets: [a,b]"),
        ("data.train=[{path: a, limit: many}]", "a whole number or null"),
        ("data.train=[3]", "a mapping with path"),
        ("loss.kind=sigmoyd", "one of sigmoid, "),
        ("loss=simpoo", "one of simpo, "),
        ("+experiment=qwen", "one of qwen7b"),
        ("+experiment=[qwen,smoke]", "one of qwen7b"),
    ],
)
def test_a_wrong_value_names_the_expected_one(override: str, expected: str) -> None:
    assert error_of(override).expected.startswith(expected)


def test_a_missing_model_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is not set") as caught:
        load_run_config(["data.train=[a.jsonl]"], verb="train")
    assert "model=NAME" in caught.value.remedy


def test_an_unknown_interpolation_names_its_key() -> None:
    assert "data.cache" in error_of("data.cache=${run.rot}/x").where


def test_an_unknown_name_in_a_term_has_its_index() -> None:
    error = error_of("loss.terms=[{kind: sigmoid},{kin: sft}]")
    assert error.message == "there is no key 'loss.terms[1].kin'"
    assert error.remedy == "did you mean loss.terms[1].kind?"


# Presets of the command line and of an experiment


def test_a_preset_of_the_command_line_applies_after_an_experiment() -> None:
    config = load_run_config(["+experiment=qwen7b_lora", "data=hh_rlhf", "model=llama3_1_8b"])
    assert (config.data.truncation, config.data.max_length) == ("keep_end", 2048)
    assert config.model.path.startswith("meta-llama/")
    assert config.model.adapter is not None, "a key that the preset lacks has the experiment's value"


def test_a_preset_without_values_restores_the_defaults_of_its_section() -> None:
    config = load_run_config(["+experiment=qwen7b", "trainer=default"])
    assert config.trainer == TrainerConfig()
    config = load_run_config(["+experiment=qwen7b", "trainer=default", "trainer.global_batch_pairs=32"])
    assert config.trainer == TrainerConfig(global_batch_pairs=32)


def test_a_loss_of_the_command_line_replaces_all_loss_options_of_an_experiment() -> None:
    config = load_run_config(["+experiment=qwen7b_lora", "loss=simpo", "loss.simpo_gamma=0.7"])
    assert (config.loss.kind, config.loss.beta, config.loss.simpo_gamma) == (LossKind.simpo, 2.0, 0.7)
    assert config.model.adapter is not None


def test_options_of_an_experiments_loss_are_dropped_with_that_loss(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nloss: {kind: simpo, simpo_gamma: 0.3}\nreference: {mode: none}\n"
    )
    config = load_run_config([*RUN, "+experiment=mine", "loss=ipo"], tmp_path)
    assert (config.loss, config.reference.mode) == (LossConfig(LossKind.ipo), ReferenceMode.cached)
    assert load_run_config([*RUN, "+experiment=mine"], tmp_path).loss.simpo_gamma == 0.3


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        (RUN, "cached"),
        ([*RUN, "loss=simpo"], "none"),
        ([*RUN, "loss.reference_free=true"], "none"),
        ([*RUN, "loss.terms=[{kind: sft},{kind: simpo}]"], "none"),
        ([*RUN, "loss=sigmoid_sft"], "cached"),
        ([*RUN, "model.adapter={r: 8}"], "adapter"),
        ([*RUN, "model.adapter={r: 8}", "model.quantization=nf4", "parallelism=ddp"], "adapter"),
        ([*RUN, "model.adapter={r: 8}", "loss=orpo"], "none"),
        ([*RUN, "model.adapter={r: 8}", "reference.path=other"], "cached"),
        ([*RUN, "model.adapter={r: 8}", "reference=cached"], "cached"),
        (["+experiment=qwen7b"], "cached"),
        (["+experiment=qwen7b", "loss=simpo"], "none"),
        (["+experiment=qwen7b", "loss.kind=sft"], "none"),
        (["+experiment=qwen7b", "reference=none", "loss=cpo"], "none"),
        (["+experiment=qwen7b", "model.adapter={r: 8}"], "adapter"),
        (["+experiment=qwen7b_lora"], "adapter"),
        (["+experiment=qwen7b_lora", "model.adapter=null"], "cached"),
        (["+experiment=qwen7b_sft", "loss=ipo"], "cached"),
    ],
)
def test_the_reference_follows_loss_and_model(overrides: list[str], mode: str) -> None:
    config = load_run_config(overrides)
    assert config.reference.mode == mode
    assert from_yaml(to_yaml(config)) == config, "config.yaml has the resolved mode"
    offload = Offload.cpu if mode == "cached" and "+experiment=qwen7b" in overrides else Offload.none
    assert config.reference.offload is offload


@pytest.mark.parametrize("mode", ["cached", "none", "adapter"])
def test_a_recorded_mode_gives_way_to_the_command_line(mode: str, tmp_path: Path) -> None:
    before = {"none": ["loss=simpo"], "adapter": ["model.adapter={r: 8}"]}.get(mode, [])
    (tmp_path / "experiment").mkdir()
    written = to_yaml(load_run_config([*RUN, *before]))
    (tmp_path / "experiment" / "again.yaml").write_text(written.replace("  dir: ", "  # dir: "))
    assert f"mode: {mode}" in written
    for loss, wanted in (("sft", "none"), ("ipo", "adapter" if mode == "adapter" else "cached")):
        config = load_run_config(["+experiment=again", f"loss={loss}"], tmp_path)
        assert config.reference.mode == wanted
    assert load_run_config(["+experiment=again", "model.adapter=null"], tmp_path).model.adapter is None


def test_the_automatic_mode_and_the_same_mode_given_are_one_run() -> None:
    for overrides, mode in (([], "cached"), (["loss=simpo"], "none"), (["model.adapter={r: 8}"], "adapter")):
        found, given = ([*RUN, *overrides, *line] for line in ([], [f"reference={mode}"]))
        assert run_digest(load_run_config(found)) == run_digest(load_run_config(given))


def test_an_option_that_the_mode_does_not_use_is_an_error() -> None:
    error = error_of("loss=simpo", "reference.offload=cpu")
    assert error.where == "reference.offload, reference.mode"


def test_a_verb_can_work_without_a_model() -> None:
    assert load_run_config(["data.train=[a.jsonl]"], verb="doctor").model.path == NO_MODEL
    assert load_run_config(RUN, verb="doctor").model.path == "m"


def test_a_preset_of_the_command_line_replaces_that_of_an_experiment() -> None:
    assert load_run_config(["+experiment=qwen7b"]).data.max_length == 2048
    assert load_run_config(["+experiment=qwen7b", "data=hh_rlhf"]).data.max_length == 1024
