"""The JSON schema that editors check files of keys by: it takes what the program takes, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dpo_dist.compat.convert import __main__ as convert
from dpo_dist.config.command_line import file_schema
from dpo_dist.config.compose import read_keys
from dpo_dist.config.keys import config_dir, group_folders, run_keys
from dpo_dist.config.load import load_run_config, to_yaml
from tests.support.pages import ROOT

pytestmark = pytest.mark.slow

SCHEMA = file_schema(group_folders())
CHECK = jsonschema.Draft202012Validator(SCHEMA)
PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "launch/README.md"]
FOREIGN = sorted((ROOT / "tests/assets/foreign").glob("*.yaml"))


def faults(content: Any) -> list[str]:
    return [fault.message[:200] for fault in CHECK.iter_errors(json.loads(json.dumps(content, default=str)))]


def files_of_pages() -> list[str]:
    """The blocks and the indented files of pages whose first key is one of a run."""
    texts = [page.read_text() for page in PAGES]
    blocks = [block for text in texts for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)]
    for text in texts:
        indented = re.findall(r"^    # \w+\.yaml\n((?:    .*\n)+)", text, re.MULTILINE)
        blocks += [re.sub("^    ", "", block, flags=re.MULTILINE) for block in indented]
    first = re.compile(r"\s*([a-z]+)", re.MULTILINE)
    return [block for block in blocks if (found := first.match(block)) and found[1] in run_keys()]


def test_the_schema_is_one_and_names_each_key_once() -> None:
    CHECK.check_schema(SCHEMA)
    assert len(files_of_pages()) >= 2
    assert not {'"verbs"', '"free"'} & {*re.findall(r'"\w+"', json.dumps(SCHEMA))}, "no words of JSON schema"
    others = [key for key in run_keys() if key not in SCHEMA["properties"]]
    assert [key for key in others if not key.startswith("loss.options")] == []


@pytest.mark.parametrize(
    "file", sorted((config_dir() / "experiment").glob("*.yaml")), ids=lambda file: file.stem
)
def test_experiments_are_valid(file: Path) -> None:
    assert faults(read_keys(file)) == []


def test_the_first_file_and_the_presets_of_sections_are_valid() -> None:
    assert faults(read_keys(config_dir() / "config.yaml")) == []
    presets = [file for file in config_dir().glob("*/*.yaml") if file.parent.name in run_keys()]
    assert len(presets) > 30
    assert [(file, found) for file in presets if (found := faults({file.parent.name: read_keys(file)}))] == []


@pytest.mark.parametrize("text", files_of_pages(), ids=lambda text: text.split("\n")[0])
def test_files_of_pages_are_valid(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "file.yaml").write_text(text)
    assert faults(read_keys(file)) == []


@pytest.mark.parametrize("file", FOREIGN, ids=lambda file: file.stem)
def test_what_convert_writes_is_valid(file: Path, tmp_path: Path) -> None:
    convert.main([str(file), str(tmp_path / "mine.yaml")])
    assert faults(read_keys(tmp_path / "mine.yaml")) == []


def test_the_configuration_that_a_run_writes_is_valid() -> None:
    for words in (["loss=simpo"], ["model.adapter={r: 4}"], ["loss=sigmoid_sft", "tracking=off"]):
        config = load_run_config(["model.path=m", "data.train=[pairs.jsonl]", *words], verb="train")
        assert faults(yaml.safe_load(to_yaml(config))) == []


@pytest.mark.parametrize(
    "text",
    [
        "loss: ipo",
        "tracking: off",
        "sampling:",
        "optim.lr: 1e-6",
        "loss.options.gamma: 1",
        "model.adapter.r: 8",
        "run.name: 2024",
        "data.train: [a.jsonl, {path: b.jsonl, weight: 0.5}]",
        "loss: {terms: [sft, {kind: ipo, weight: 0.5}]}",
        "evaluation.model: [./other]",
        "optim.lr: 1e-6,1e-5",
        "loss.beta: interval(0.1, 0.5)",
        "trainer.max_steps: ${trainer.eval_every}",
        "defaults: [override /loss: ipo, smollm2]",
        "defaults: smollm2",
    ],
)
def test_a_form_that_files_may_have_is_valid(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "file.yaml").write_text(text)
    assert faults(read_keys(file)) == []


@pytest.mark.parametrize(
    "text",
    [
        "lose: ipo",
        "loss: ippo",
        "loss.betta: 0.2",
        "optim: {rate: 1}",
        "optim: {lr: fast}",
        "optim: {lr: -1}",
        "model: {adapter: {r: 0}}",
        "data: {train: [{weight: 0.5}]}",
        "data: {truncation: ignore}",
        "loss: {kind: dpo2}",
        "model: {adapter.r: 4}",
    ],
)
def test_a_mistake_is_shown(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "file.yaml").write_text(text)
    assert len(faults(read_keys(file))) == 1
