"""`loss.options`: each kind of loss has its own, typed, and refuses those of other kinds."""

import shlex
from pathlib import Path

import pytest
from pydantic import ValidationError

from dpo_dist.config.command_line import explain
from dpo_dist.config.identity import settings
from dpo_dist.config.keys import all_keys, group_folders
from dpo_dist.config.load import differing_keys
from dpo_dist.config.losses import (
    KINDS,
    BcoPairOptions,
    BetaDpoOptions,
    DpopOptions,
    LossConfig,
    LossKind,
    LossTermConfig,
    OdpoOptions,
    SimpoOptions,
    kinds_using,
    option_names,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import schema_fields
from dpo_dist.tools.sweep.points import load_points
from tests.unit.config.support import RUN, configured, error_of, written_and_read

OPTIONS = sorted({name for kind in LossKind for name in option_names(kind)})
SIMPO_AND_SFT = "loss.terms=[{kind:simpo,options:{gamma:%s}},{kind:sft}]"


@pytest.mark.parametrize("kind", LossKind)
def test_a_kind_has_its_options_at_their_defaults_and_refuses_all_others(kind: LossKind) -> None:
    kind_options = KINDS[kind].options
    assert LossConfig(kind).options == (kind_options and kind_options())
    assert LossTermConfig(kind).options == LossConfig(kind).options
    for name in OPTIONS:
        value = all_keys()[f"loss.options.{name}"].default
        given = {"kind": kind, "options": {name: value}}
        if kind in kinds_using(f"options.{name}"):
            assert getattr(LossConfig(**given).options, name) == value
        else:
            for schema in (LossConfig, LossTermConfig):
                with pytest.raises(ValidationError, match=f"no options of {kind}: \\['{name}'\\]"):
                    schema(**given)  # type: ignore[arg-type]


def test_an_option_of_a_name_is_of_the_class_that_is_asked_for() -> None:
    """`alpha` is an option of two kinds; of a kind that is not in the loss the defaults count."""
    terms = [LossTermConfig(LossKind.odpo, options=OdpoOptions(alpha=3.0)), LossTermConfig(LossKind.beta_dpo)]
    loss = LossConfig(terms=terms)
    assert (loss.options_of(OdpoOptions).alpha, loss.options_of(BetaDpoOptions).alpha) == (3.0, 0.6)
    assert loss.options_of(DpopOptions) == DpopOptions()
    loss = LossConfig(LossKind.beta_dpo, options=BetaDpoOptions(alpha=0.1))
    assert (loss.options_of(OdpoOptions).alpha, loss.options_of(BetaDpoOptions).alpha) == (1.0, 0.1)


def test_options_on_the_command_line_in_presets_and_in_files(tmp_path: Path) -> None:
    assert configured("loss=simpo").loss.options == SimpoOptions(gamma=1.0)
    assert configured("loss=simpo loss.options.gamma=0.7").loss.options == SimpoOptions(gamma=0.7)
    assert configured("loss=simpo 'loss.options={gamma: 0.7}'").loss.options == SimpoOptions(gamma=0.7)
    assert configured("loss=simpo loss.options=null").loss.options == SimpoOptions()
    (file := tmp_path / "my.yaml").write_text("loss: simpo\nloss.options.gamma: 1.5\n")
    assert configured(str(file)).loss.options == SimpoOptions(gamma=1.5)
    assert configured(f"{file} loss=bco_pair").loss.options == BcoPairOptions(), "a preset replaces them"
    assert configured(f"{file} loss=ipo loss.kind=sigmoid").loss.options is None
    config = configured(SIMPO_AND_SFT % 2)
    assert [term.options for term in config.loss.terms] == [SimpoOptions(gamma=2.0), None]
    assert written_and_read(config) == config
    config = configured("loss=simpo loss.options.gamma=2")
    assert written_and_read(config) == config


@pytest.mark.parametrize(
    ("typed", "message", "text"),
    [
        (
            "loss=dpop loss.options.gamma=1",
            "dpop has no option 'gamma'",
            "expected: one of penalty_weight",
        ),
        ("loss.options.gamma=1", "sigmoid has no option 'gamma'", "expected: no option"),
        (
            "loss=simpo loss.kind=ipo",
            "ipo has no option 'gamma'",
            "a loss that has it: simpo; loss=NAME",
        ),
        ("loss.options.alpha=1", "sigmoid has no option 'alpha'", "a loss that has it: beta_dpo, odpo;"),
        (
            "loss=simpo loss.options.gama=1",
            "simpo has no option 'gama'",
            "where:    command line: loss.options.gama=1\n  got:      1\n"
            "  expected: one of gamma\n  to do:    did you mean loss.options.gamma?",
        ),
        (
            "loss=beta_dpo loss.options.x=1",
            "beta_dpo has no option 'x'",
            "expected: one of alpha, momentum\n  to do:    remove it",
        ),
        ("loss.options.x=1", "sigmoid has no option 'x'", "to do:    remove it"),
        (
            "loss.terms=[{kind:sft},{kind:simpo,options:{tau:1}}]",
            "simpo has no option 'tau'",
            "expected: one of gamma",
        ),
        (
            "loss=simpo loss.terms=[{kind:simpo},{kind:sft}]",
            "each entry of loss.terms has its own options",
            "to do:    remove it; loss=NAME replaces all options of the loss",
        ),
        (f"loss.options.gamma=1 {SIMPO_AND_SFT % 2}", "each entry of loss.terms has its own options", ""),
        ("loss=simpo loss.options=3", "loss.options cannot have this value", "a mapping with options"),
        ("loss=simpo loss.options.gamma=-1", "loss.options.gamma cannot have this value", "a number, >= 0"),
        ("loss=simpo loss.options.gamma=x", "loss.options.gamma cannot have this value", "a number, >= 0"),
        ("loss=discopop loss.options.tau=1.5", "loss.options.tau cannot have", "a number, > 0 and <= 1"),
        ("loss=bco_pair loss.options.delta=mean", "loss.options.delta cannot", "one of zero, running_mean"),
        (SIMPO_AND_SFT % -1, "loss.terms[0].options.gamma cannot have this value", "a number, >= 0"),
    ],
)
def test_a_wrong_option_is_one_error_with_those_of_the_kind(typed: str, message: str, text: str) -> None:
    error = error_of(typed)
    assert error.message.startswith(message)
    assert text in error.block()


def test_all_wrong_options_are_one_error() -> None:
    error = error_of("loss=simpo loss.options.x=1 loss.options.tau=1 optim.lr=0")
    assert error.message == "this command has 3 mistakes"
    for text in ("simpo has no option 'x'", "simpo has no option 'tau'", "optim.lr cannot have"):
        assert text in error.remedy


def test_a_sweep_over_an_option_has_a_run_for_each_value() -> None:
    points = load_points([*RUN, "loss=simpo", "loss.options.gamma=0.5,1.5"])
    assert [config.loss.options for config in points.values()] == [SimpoOptions(0.5), SimpoOptions(1.5)]
    assert len({config.run.dir for config in points.values()}) == 2
    with pytest.raises(ConfigError) as caught:
        load_points([*RUN, "loss.kind=simpo,sigmoid,ipo", "loss.options.gamma=1"])
    for kind in ("sigmoid", "ipo"):
        assert f"{kind} has no option 'gamma'" in caught.value.block()


def test_the_digest_has_the_options_of_the_kind_and_defaults_count_as_written() -> None:
    simpo = configured("loss=simpo")
    assert simpo.identity.digest == configured("loss=simpo loss.options.gamma=1").identity.digest
    assert simpo.identity.digest != configured("loss=simpo loss.options.gamma=1.1").identity.digest
    assert configured(SIMPO_AND_SFT % 1).identity.digest != configured(SIMPO_AND_SFT % 2).identity.digest
    written = configured(SIMPO_AND_SFT % 0.5)
    assert written.identity.digest == configured("loss.terms=[{kind:simpo},{kind:sft}]").identity.digest


def test_the_settings_of_a_run_have_the_options_that_are_not_at_their_default() -> None:
    assert settings(configured("loss=simpo"))["loss.options"] == {"gamma": 1.0}
    assert "loss.options" not in settings(configured("loss=simpo loss.options.gamma=0.5"))
    assert settings(configured(SIMPO_AND_SFT % 2))["loss.terms"] == [
        {"kind": "simpo", "options": {"gamma": 2.0}},
        {"kind": "sft"},
    ]
    assert settings(configured(SIMPO_AND_SFT % 0.5))["loss.terms"] == [{"kind": "simpo"}, {"kind": "sft"}]
    old, new = configured("loss.kind=simpo"), configured("loss.kind=simpo loss.options.gamma=2")
    assert differing_keys(old.identity, new.identity) == {"loss.options": (None, {"gamma": 2.0})}


def test_help_of_an_option_has_its_kind_twice_if_two_kinds_have_the_name() -> None:
    gamma = explain("loss.options.gamma", group_folders())
    assert "kinds:    simpo" in gamma
    alpha = explain("loss.options.alpha", group_folders())
    assert "default:  1.0" in alpha.split("kinds:    odpo")[0]
    assert "default:  0.6" in alpha.split("kinds:    odpo")[1].split("kinds:    beta_dpo")[0]
    listed = explain("loss.options", group_folders())
    for kind in LossKind:
        for name in option_names(kind):
            meaning = schema_fields(KINDS[kind].options)[name].description
            assert meaning is not None
            assert f"`{kind}`" in meaning
            assert meaning in listed


@pytest.mark.parametrize("word", ["loss.options={gammma: 1}", "loss.options.gammma=1"])
def test_a_mistyped_option_of_the_kind_is_named_and_its_word(word: str) -> None:
    error = error_of(f"loss=simpo {shlex.quote(word)}")
    assert error.remedy == "did you mean loss.options.gamma?"
    assert error.where == f"command line: {word}"
