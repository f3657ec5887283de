"""A config.yaml that is read back evaluates nothing and opens no door to code."""

import os
from pathlib import Path

import pytest
import yaml

from dpo_dist.config.command_line import Arguments, with_former_run
from dpo_dist.config.load import compose, from_yaml, load_run_config, resolve, to_yaml
from dpo_dist.config.user_code import open_doors, written_values
from dpo_dist.foundation.errors import ConfigError

RUN = ["model.path=m", "data.train=[a.jsonl]"]
CANARY = "canary-of-the-environment"


def former(tmp_path: Path, text: str, *overrides: str) -> str:
    (tmp_path / "config.yaml").write_text(text)
    arguments = Arguments({}, [f"run.dir={tmp_path}", *overrides])
    with with_former_run(arguments) as whole:
        return to_yaml(resolve(compose(whole.overrides, whole.own_folder), whole.overrides, whole.own_folder))


@pytest.mark.parametrize(
    "text",
    [
        "run:\n  name: ${oc.env:DB_PASSWORD}\n",
        "run:\n  name: x${oc.env:DB_PASSWORD}\n",
        "data:\n  train:\n  - path: ${oc.env:DB_PASSWORD}\n",
        "a: &a [x]\nb: [*a, *a]\n",
        "run:\n  name: !!python/object/apply:os.system [touch trace]\n",
        "defaults:\n- override /hydra/launcher: evil\n",
        "hydra:\n  callbacks:\n    a:\n      _target_: os.system\n",
        "run:\n  _target_: os.system\n",
        "[1, 2]",
        "a: [",
    ],
)
def test_nothing_in_a_config_of_a_run_is_evaluated(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", CANARY)
    for read in (lambda: former(tmp_path, text), lambda: from_yaml(text)):
        with pytest.raises(ConfigError) as raised:
            read()
        assert CANARY not in str(raised.value)


def test_a_comment_at_the_start_is_no_command(tmp_path: Path) -> None:
    text = to_yaml(load_run_config([*RUN, "loss.beta=0.25"]))
    assert "beta: 0.25" in former(tmp_path, "# @package hydra\n# @package run\n" + text)


@pytest.mark.parametrize("before", ["", "\n", " ", "\x85", "# a comment\n\n", "\n# a comment\n"])
def test_a_package_in_a_config_of_a_run_opens_no_door(before: str, tmp_path: Path) -> None:
    text = f"{before}# @package model\npath: m\ntrust_remote_code: true\n"
    with pytest.raises(ConfigError, match="there is no key"):
        former(tmp_path, text, "data.train=[a.jsonl]")


@pytest.mark.parametrize("order", [1, -1])
def test_two_spellings_of_a_key_open_no_door(order: int, tmp_path: Path) -> None:
    parts = ["model: {path: m, trust_remote_code: true}\n", "model.trust_remote_code: false\n"][::order]
    with pytest.raises(ConfigError, match="asks to run code"):
        former(tmp_path, "".join(parts))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.trust_remote_code", "true"),
        ("loss.function", "tests.support.own_loss:hinge"),
        ("pairs.function", "tests.support.own_judge:judge"),
    ],
)
def test_a_config_of_a_run_opens_no_door(key: str, value: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    values = {"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}}
    values.setdefault(section, {})[name] = yaml.safe_load(value)
    text = yaml.safe_dump(values)
    with pytest.raises(ConfigError, match="asks to run code") as raised:
        former(tmp_path, text)
    assert f"add {key}={value} to the command" in raised.value.remedy
    assert written_values(text)


def test_open_doors_are_named() -> None:
    assert open_doors(load_run_config(RUN)) == []
    lines = open_doors(load_run_config([*RUN, "model.trust_remote_code=true"]))
    assert lines == ["warning: model.trust_remote_code=true: Python code of model folders is run"]


@pytest.mark.parametrize("text", ["a: " + "[" * 5000 + "]" * 5000, "{a: " * 5000 + "1" + "}" * 5000])
def test_a_deep_config_of_a_run_is_an_error(text: str, tmp_path: Path) -> None:
    for read in (lambda: former(tmp_path, text), lambda: from_yaml(text)):
        with pytest.raises(ConfigError):
            read()


def test_a_huge_config_of_a_run_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    os.truncate(tmp_path / "config.yaml", 2**29)
    with (
        pytest.raises(ConfigError, match="cannot be read"),
        with_former_run(Arguments({}, [f"run.dir={tmp_path}"])),
    ):
        pass


@pytest.mark.parametrize("key", ["export.output", "data.cache"])
def test_a_config_of_a_run_chooses_no_place_for_a_new_folder(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, run = tmp_path / "work", tmp_path / "run"
    work.mkdir()
    run.mkdir()
    monkeypatch.chdir(work)

    def read(value: object, *overrides: str) -> None:
        section, name = key.split(".")
        text = yaml.safe_dump({"model": {"path": "m"}, section: {name: str(value)}})
        (run / "config.yaml").write_text(text)
        with with_former_run(Arguments({}, [f"run.dir={run}", *overrides]), (key,)):
            pass

    for value in (tmp_path / "elsewhere", "../elsewhere", "~/elsewhere"):
        with pytest.raises(ConfigError, match="names a folder that does not exist") as raised:
            read(value)
        assert raised.value.remedy == f"add {key}=FOLDER to the command"
        read(value, f"{key}=mine")
    for value in (run, "output/encoded", work / "new"):
        read(value)


def test_a_model_that_was_hidden_as_a_secret_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_KEY", "a-bucket-of-models")
    text = to_yaml(load_run_config(["model.path=/mnt/a-bucket-of-models/m", "data.train=[a.jsonl]"]))
    with pytest.raises(ConfigError, match="hidden as a secret") as raised:
        former(tmp_path, text)
    assert raised.value.got == "/mnt/***/m"
