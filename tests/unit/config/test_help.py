"""`--help KEY` explains every key, section and group of presets."""

import re
from pathlib import Path

import pytest

import dpo_dist
from dpo_dist import compare
from dpo_dist.config.command_line import explain, usage
from dpo_dist.config.fields import EVERY_VERB
from dpo_dist.config.keys import all_keys, section_meanings
from dpo_dist.config.load import group_folders
from dpo_dist.config.losses import KINDS
from dpo_dist.config.rules import keys_of
from dpo_dist.foundation.errors import ConfigError


def facts(key: str) -> dict[str, str]:
    """The labelled lines of an explanation."""
    lines = [line.strip().partition(":") for line in explain(key, group_folders()).splitlines()[1:]]
    return {label: text.strip() for label, _, text in lines}


def test_every_key_and_section_is_explained() -> None:
    for key, row in all_keys().items():
        explained = facts(key)
        assert explained["meaning"] == row.meaning != ""
        assert explained["type"]
        assert explained["default"]
        assert explained["verbs"] == ", ".join(row.verbs) != ""
        assert explained["digest"].startswith("part of" if row.defines_result else "not part of")
    for section, meaning in section_meanings().items():
        text = explain(section, group_folders())
        assert text.startswith(f"{section}: {meaning}")
        for key in all_keys():
            assert (f"\n  {key} " in text) == key.startswith(f"{section}.")


def test_the_facts_of_some_keys() -> None:
    assert facts("loss.beta")["type"] == "a number, > 0"
    assert facts("trainer.max_steps")["type"] == "a whole number or null, >= 1"
    assert facts("loss.simpo_gamma")["kinds"] == "simpo"
    assert facts("model.path")["default"] == "none, it must be set"
    assert facts("tracking.wandb")["type"] == "one of auto, online, offline, off"
    assert facts("data.train[0].weight") == facts("data.train.weight") == facts("data.train[].weight")
    assert facts("data.train.weight")["verbs"] == "train, precompute"
    assert facts("pairs.endpoint.url")["verbs"] == "compare, pairs"
    assert "presets: parallelism=ddp|zero2|zero3|" in explain("parallelism", group_folders())
    assert "presets: +experiment=demo|" in explain("experiment", group_folders())
    kinds = explain("loss.kind", group_folders())
    assert all(f"\n  {kind} " in kinds and facts.source in kinds for kind, facts in KINDS.items())


def test_the_verbs_are_the_programs_with_a_configuration() -> None:
    modules = Path(dpo_dist.__file__).parent.glob("*.py")
    programs = {module.stem for module in modules if "run_verb(main" in module.read_text()}
    assert set(EVERY_VERB.split()) == programs
    assert {verb for row in all_keys().values() for verb in row.verbs} == programs


def test_the_help_of_a_verb_begins_with_the_verb() -> None:
    command = "python -m dpo_dist.compare"
    text = usage(command, compare.__doc__ or "", keys_of("compare"), group_folders())
    assert text.startswith("usage: python -m dpo_dist.compare ")
    assert "\nCompare models: `python -m dpo_dist.compare 'compare.models=[" in text
    listed = set(re.findall(r"^  (\w+):? ", text, re.MULTILINE))
    assert {"compare", "data", "parallelism", "experiment"} <= listed
    assert not listed & {"optim", "trainer", "samples", "tracking", "doctor", "export", "loss"}
    assert "69 lost process" in text


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("learning_rate", "write optim.lr=..."),
        ("data.train.wieght", "did you mean data.train[].weight?"),
        ("data.train[0].max_samples", "did you mean limit?"),
        ("nothing", "the sections are run, model, "),
    ],
)
def test_an_unknown_key_gets_the_suggestions_of_an_override(key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        explain(key, group_folders())
    assert remedy in raised.value.remedy
