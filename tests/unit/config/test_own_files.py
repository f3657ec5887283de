"""A plain YAML file of one's own: its keys over the defaults, the command line over it."""

from pathlib import Path

import pytest

from dpo_dist.config.command_line import divide
from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError

MINE = """
model: {path: m}
data: {train: [a.jsonl, {path: b, limit: 3}]}
loss: {kind: ipo, beta: 0.3, length_average: false}
optim.lr: 2e-6
parallelism: ddp
samples: {max_new_tokens: 64, prompts: 4}
data.eval_share: 0.1
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(MINE)
    Path("seed.yml").write_text("trainer: {seed: 3}\nloss: {beta: 0.4}\n")
    Path("conf/experiment").mkdir(parents=True)
    return tmp_path


def load(*words: str, verb: str = "") -> RunConfig:
    arguments = divide(words)
    return load_run_config(arguments.words, arguments.own_folder, verb=verb, mistakes=arguments.mistakes)


def test_a_file_is_the_same_run_as_its_keys_on_the_command_line() -> None:
    config = load("mine.yaml", verb="train")
    assert (config.loss.kind, config.loss.beta, config.optim.lr) == ("ipo", 0.3, 2e-6)
    assert (config.parallelism.kind, config.data.train[1].limit) == ("ddp", 3)
    typed = load(
        *("model.path=m", "data.train=[a.jsonl,{path: b, limit: 3}]", "loss=ipo", "loss.beta=0.3"),
        *("loss.length_average=false", "optim.lr=2e-6", "data.eval_share=0.1"),
    )
    assert run_digest(config) == run_digest(typed) != run_digest(load("mine.yaml", "loss.beta=0.2"))


def test_files_are_merged_left_to_right_and_the_command_line_wins() -> None:
    assert load("mine.yaml", "seed.yml").loss.beta == 0.4
    assert load("seed.yml", "mine.yaml").loss.beta == 0.3
    config = load("seed.yml", "mine.yaml", "loss.beta=0.2", "trainer.seed=5")
    assert (config.loss.beta, config.trainer.seed) == (0.2, 5)
    config = load("mine.yaml", "loss=simpo")
    assert (config.loss.kind, config.loss.beta, config.loss.length_average) == ("simpo", 2.0, True)


def test_a_file_applies_after_an_experiment_and_may_choose_presets() -> None:
    Path("preset.yaml").write_text("loss: hinge\ntrainer: {seed: 4}\n")
    config = load("+experiment=qwen7b_sft", "preset.yaml", "seed.yml")
    assert (config.model.path, config.loss.kind, config.loss.beta) == ("Qwen/Qwen2.5-7B", "hinge", 0.4)
    assert config.trainer.seed == 3


@pytest.mark.parametrize(
    ("files", "kind", "beta"),
    [
        (["loss: simpo\nloss.beta: 2.5\n"], "simpo", 2.5),
        (["loss.beta: 3\nloss: simpo\n"], "simpo", 3.0),
        (["loss: {kind: simpo, simpo_gamma: 1.5}\n", "loss: ipo\n"], "ipo", 0.1),
        (["loss: {beta: 0.3}\n", "loss: simpo\n"], "simpo", 2.0),
        (["loss: simpo\n", "loss.beta: 2.5\n"], "simpo", 2.5),
    ],
)
def test_a_preset_of_a_file_is_below_its_own_keys_and_replaces_earlier_ones(
    files: list[str], kind: str, beta: float
) -> None:
    for number, text in enumerate(files):
        Path(f"{number}.yaml").write_text(text)
    names = [f"{number}.yaml" for number in range(len(files))]
    config = load("model.path=m", "data.train=[a]", *names)
    assert (config.loss.kind, config.loss.beta) == (kind, beta)


def test_a_file_may_have_keys_of_several_verbs() -> None:
    Path("more.yaml").write_text("doctor: {texts: false}\n")
    assert not load("mine.yaml", "more.yaml", verb="train").doctor.texts


@pytest.mark.parametrize("header", ["", "# @package _global_\n", "# my run\n"])
def test_an_experiment_of_ones_own_needs_no_package_line(header: str) -> None:
    file = Path("conf/experiment/mine.yaml")
    file.write_text(header + "defaults:\n- override /loss: hinge\nloss: {beta: 0.7}\nmodel: {path: m}\n")
    config = load("--config-dir", "conf", "+experiment=mine", "trainer.seed=2")
    assert (config.model.path, config.loss.kind, config.loss.beta) == ("m", "hinge", 0.7)


def test_every_mistake_in_files_is_named_with_its_file() -> None:
    Path("bad.yaml").write_text("learning_rate: 1e-5\nloss: {betta: 1}\nlora_rank: 8\ntrainer: {seed: x}\n")
    with pytest.raises(ConfigError) as found:
        load("bad.yaml", "gone.yaml", "epochs=2")
    text = found.value.block()
    assert "this command has 6 mistakes" in text
    for line in (
        "learning_rate in bad.yaml: there is no key 'learning_rate'; write optim.lr=1e-05",
        "loss.betta in bad.yaml: there is no key 'loss.betta'; did you mean loss.beta?",
        "lora_rank in bad.yaml: there is no key 'lora_rank'; write model.adapter.r=8",
        "trainer.seed in bad.yaml (x): trainer.seed has the wrong type",
        "gone.yaml (No such file or directory): this file of keys cannot be read",
        "epochs=2: there is no key 'epochs'; write trainer.epochs=2",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("tracking: {wandb: off}", "put the word in quotes"),
        ("loss: {beta: [1", 'mine.yaml", line 2'),
        ("- a", "this file has no keys"),
        ("loss: ipoo", "did you mean loss=ipo?"),
        ("experiment: qwen7b", "+experiment=NAME"),
        ("defaults: [other]", "the list of defaults names presets only"),
        ("defaults: [{override /loss: ipoo}]", "did you mean loss=ipo?"),
    ],
)
def test_a_mistake_in_a_file_is_one_block(content: str, text: str) -> None:
    Path("mine.yaml").write_text(f"{content}\n")
    with pytest.raises(ConfigError) as found:
        load("mine.yaml")
    assert text in found.value.block()
