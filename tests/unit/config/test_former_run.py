"""The config.yaml of a run stands in for its command; it evaluates nothing and opens no door."""

import contextlib
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dpo_dist.config.command_line import saved_values, split_words
from dpo_dist.config.load import load_run_config, saved_config, to_yaml
from dpo_dist.config.named_code import COMMAND, NAMED_CODE, code_warnings
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.types import as_tree

pytestmark = pytest.mark.slow

RUN = ("model.path=m", "data.train=[{path: a.jsonl, limit: 3}]", "loss=ipo", "loss.beta=0.3", "optim.lr=1e-5")


def evaluated(*words: str) -> RunConfig:
    arguments = split_words(words)
    return load_run_config(arguments.words, saved=saved_values(arguments))


def write_run(folder: Path, *overrides: str) -> RunConfig:
    config = load_run_config([*RUN, f"run.dir={folder}", *overrides])
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    return config


def test_a_run_directory_stands_for_its_command_whose_keys_and_presets_can_be_changed(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", "model.adapter={r: 4}", "reference.mode=adapter")
    place = f"run.dir={tmp_path}/run"
    assert evaluated(place) == config
    found = evaluated(place, "evaluation.data=[hard.jsonl]", "loss.beta=0.5")
    assert (found.loss.kind, found.loss.beta, found.optim.lr) == ("ipo", 0.5, 1e-5)
    assert [source.path for source in found.evaluation.data] == ["hard.jsonl"]
    found = evaluated(place, "loss=hinge")
    assert (found.loss.kind, found.loss.beta) == ("hinge", 0.1)
    found = evaluated(place, "model.path=other", "data.train=[b.jsonl]")
    assert (found.model.path, found.loss.kind) == ("other", "sigmoid"), "a command with a model is whole"


def test_the_doctor_takes_a_run_or_data_alone(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run")

    def examined(*words: str) -> RunConfig:
        arguments = split_words(words)
        former = saved_values(arguments, "doctor")
        return load_run_config(arguments.words, verb="doctor", saved=former)

    assert examined(f"run.dir={tmp_path}/run").data == config.data
    alone = examined("data.train=[b.jsonl]", f"run.dir={tmp_path}/new")
    assert [source.path for source in alone.data.train] == ["b.jsonl"]
    with pytest.raises(ConfigError, match="no training data is given") as refused:
        examined("doctor.fail_on=warning")
    assert refused.value.remedy.endswith("or name a run: run.dir=RUN")


def test_a_mistyped_run_directory_is_named_with_the_runs_beside_it(tmp_path: Path) -> None:
    for name in ("beta01", "beta05", "warmup", "zero"):
        write_run(tmp_path / name)
    with pytest.raises(ConfigError) as found:
        evaluated(f"run.dir={tmp_path}/bta05")
    assert "no run directory" in str(found.value)
    assert found.value.where == f"{tmp_path}/bta05"
    assert found.value.remedy.startswith(f"name one run, such as {tmp_path}/beta05 or")
    assert evaluated(f"run.dir={tmp_path}/new", *RUN[:2]).run.dir == f"{tmp_path}/new", "a whole command"


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'])}]\n" for i in range(12)).encode()


@pytest.mark.parametrize("content", [b"- a\n", b"a: [", b"\xff", b"a: " + b"[" * 500 + b"]" * 500, BOMB])
def test_a_damaged_configuration_is_named(content: bytes, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="configuration of this run cannot be read") as found:
        evaluated(f"run.dir={tmp_path}/run")
    assert found.value.where == str(file)


@pytest.mark.parametrize(
    "text",
    [
        "run:\n  name: ${oc.env:DB_PASSWORD}\n",
        "run:\n  name: !!python/object/apply:os.system [touch trace]\n",
        "defaults:\n- override /hydra/launcher: evil\n",
        "hydra:\n  callbacks:\n    a:\n      _target_: os.system\n",
        "model.trust_remote_code: true\n",
    ],
)
def test_nothing_in_a_config_of_a_run_is_evaluated(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "canary")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    for read in (lambda: evaluated(f"run.dir={tmp_path}"), lambda: saved_config(file)):
        with pytest.raises(ConfigError) as raised:
            read()
        assert "canary" not in str(raised.value)


@pytest.mark.parametrize("text", ["loss: [", "loss: {beta: much}"])
def test_a_config_that_cannot_be_read_is_named_by_its_path(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        saved_config(file)
    assert raised.value.where.endswith(str(file))


def test_a_wrong_value_of_a_run_is_not_blamed_on_a_preset(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("lr: 1.0e-05", "lr: fast"))
    with pytest.raises(ConfigError, match=r"optim\.lr cannot have this value") as found:
        evaluated(f"run.dir={tmp_path}/run")
    assert found.value.where == "the run's config.yaml"


TRUST = "if you trust this code, add "
CODE = {
    "data.train": [{"path": "a", "reader": "my_reader:read"}],
    "data.eval": [{"path": "b"}, {"path": "a", "reader": "my_reader:read"}],
    "evaluation.data": [{"path": "a", "reader": "my_reader:read"}],
}


@pytest.mark.parametrize("key", sorted({*NAMED_CODE} - {COMMAND}))
@pytest.mark.parametrize("is_dotted", [False, True])
def test_a_config_of_a_run_opens_no_door(key: str, is_dotted: bool, tmp_path: Path) -> None:
    """Every key that is declared to name code, in both spellings; the word of the remedy opens it."""
    value = CODE.get(key, key == "model.trust_remote_code" or "tests.support.own_loss:hinge")
    values = {"model.path": "m", "data.train": ["a.jsonl"], key: value}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values if is_dotted else as_tree(values)))
    for words in ((), ("loss={beta: 0.3}", "data={max_length: 64}"), (f"~{key}",)):
        with pytest.raises(ConfigError) as raised:
            evaluated(f"run.dir={tmp_path}", *words)
        if not any(word.startswith("~") for word in words):
            assert "asks to run code" in raised.value.message
            [word] = shlex.split(raised.value.remedy.removeprefix(TRUST))
            assert word.startswith(f"{key}=")
    with contextlib.suppress(ConfigError):  # a rule between keys
        assert evaluated(f"run.dir={tmp_path}", word)


@pytest.mark.parametrize(
    "typed",
    [
        "model.trust_remote_code=true",
        "+model.trust_remote_code=true",
        "++model.trust_remote_code=true",
        "model={trust_remote_code: true}",
        "+model={trust_remote_code: true}",
    ],
)
def test_code_is_named_in_every_spelling_of_a_command(typed: str, tmp_path: Path) -> None:
    """A command may trust the code of a run, and code that it trusts is warned of."""
    write_run(tmp_path / "run", "model.trust_remote_code=true")
    config = evaluated(f"run.dir={tmp_path}/run", typed)
    alone = load_run_config([*RUN, typed])
    for found in (config, alone):
        assert code_warnings(asdict(found))[0].startswith("warning: model.trust_remote_code=true")


@pytest.mark.parametrize(
    "text",
    [
        "# @package _global_\nmodel: {trust_remote_code: true}\n",
        "# @package model\ntrust_remote_code: true\n",
        "# @package _global_\ndefaults: [override /model: mine]\n",
    ],
)
def test_code_of_experiments_and_presets_is_warned_of(text: str, tmp_path: Path) -> None:
    for name, content in (("experiment", text), ("model", "trust_remote_code: true\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(content)
    config = load_run_config([*RUN, "+experiment=mine"], tmp_path)
    assert len(code_warnings(asdict(config))) == 1


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.reuses_config])
def test_a_config_of_a_run_never_sets_a_command(verb: str, tmp_path: Path) -> None:
    """No verb that reads one trains: the run is examined as if the command were not there."""
    text = "model: {path: m}\ndata: {train: [a.jsonl]}\nreference: {mode: cached}\n"

    def read(spelling: str) -> RunConfig:
        (tmp_path / "config.yaml").write_text(text + spelling)
        arguments = split_words([f"run.dir={tmp_path}"])
        return load_run_config(arguments.words, verb=verb, saved=saved_values(arguments, verb))

    config = read("run: {after_checkpoint: touch here}\n")
    assert config.run.after_checkpoint is None
    assert code_warnings(asdict(config)) == []
    with pytest.raises(ConfigError, match="after_checkpoint"):
        read("run.after_checkpoint: touch here\n")


def test_a_command_is_announced_before_it_runs() -> None:
    lines = code_warnings(asdict(load_run_config([*RUN, "run.after_checkpoint=touch here"])))
    assert lines == ["warning: run.after_checkpoint=touch here: this shell command is run"]


def test_data_with_readers_are_trusted_by_the_whole_list_and_stay_as_they_are(tmp_path: Path) -> None:
    """The words of the remedy give the run's own data; every reader is named before it runs."""
    sources = (
        "{path: a.jsonl, reader: one:f}, {path: 'b é.jsonl', split: 'train[:9%]', fields: {pair: x}, "
        "reader: two:g, label: '1e5', weight: 2}, {path: c.jsonl, reader: one:f}"
    )
    words = (f"data.train=[{sources}]", "data.eval=[{path: x y.jsonl, reader: three:h}]")
    config = write_run(tmp_path / "run", *words)
    with pytest.raises(ConfigError, match="asks to run code") as raised:
        evaluated(f"run.dir={tmp_path}/run")
    trusted = shlex.split(raised.value.remedy.removeprefix(TRUST))
    assert evaluated(f"run.dir={tmp_path}/run", *trusted) == config
    lines = "".join(code_warnings(asdict(config)))
    for shown in (raised.value.got, lines):
        assert "data.train[].reader=one:f, two:g" in shown
        assert "data.eval[].reader=three:h" in shown


@pytest.mark.parametrize("verb", ["evaluate", "export", "doctor", "precompute"])
@pytest.mark.parametrize(
    "trusted",
    ["loss.function=tests.support.own_loss:hinge", "metrics.function=tests.support.own_metrics:mean"],
)
def test_code_of_a_run_is_trusted_by_its_key_in_the_command(verb: str, trusted: str, tmp_path: Path) -> None:
    kind = "loss=custom" if trusted.startswith("loss") else "loss=sigmoid"
    write_run(tmp_path / "run", kind, "data.eval=[b.jsonl]", trusted)
    arguments = split_words([f"run.dir={tmp_path}/run", trusted])
    config = load_run_config(arguments.words, saved=saved_values(arguments, verb), verb=verb)
    assert trusted.partition("=")[2] in (config.loss.function, config.metrics.function)


def test_open_doors_are_named() -> None:
    lines = code_warnings(asdict(load_run_config([*RUN, "model.trust_remote_code=true"])))
    assert lines == ["warning: model.trust_remote_code=true: Python code of model folders is run"]
