"""Training needs neither a package of the extra `tools` nor the rooms above it; a verb says what it needs."""

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.training.reporting.metrics_log import stored_rows
from tests.e2e.conftest import small_run
from tests.support.launch import ROOT, environment

EXTRA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tools"]
IMPORTED_AS = {"scikit-learn": "sklearn"}
WITHOUT = """
import json, os, runpy, sys
hidden, commands = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(hidden)  # as if they were not installed
import dpo_dist.api, dpo_dist.training.run
for name, (module, words) in commands.items():
    if os.fork() == 0:
        for descriptor in (1, 2):
            os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """Exit codes and screens of verbs without the extra, by verb; and the folder of the run."""

    codes: dict[str, int]
    folder: Path

    def screen(self, verb: str) -> str:
        return (self.folder / f"{verb}.txt").read_text()


@pytest.fixture(scope="module")
def ended(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The verbs, each on a fork of one process that cannot import the packages of the extra."""
    folder = tmp_path_factory.mktemp("without")
    evaluated, usual = f"data.eval=[{assets}/eval.jsonl]", [*small_run(assets, folder), "optim.lr=1e-4"]
    words = {
        "train": [*usual, evaluated, "samples.prompts=2", "sampling.max_new_tokens=4", "trainer.max_steps=2"],
        "compare": [f"compare.models=[{assets}/model,b={assets}/model]", evaluated],
        "pairs": [f"data.train=[{assets}/train.jsonl]", "pairs.method=people"],  # before its page is served
    }
    names = [requirement.partition(">=")[0] for requirement in EXTRA]
    hidden = [IMPORTED_AS.get(name, name) for name in names]
    commands = {verb: (VERBS[verb].module, arguments) for verb, arguments in words.items()}
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps([hidden, commands])],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return Ended({verb: int(code) for verb, code in map(str.split, said.splitlines())}, folder)


def test_training_samples_and_its_page_need_no_package_of_the_tools(ended: Ended) -> None:
    screen = ended.screen("train")
    assert ended.codes["train"] == 0, screen
    assert (ended.folder / "run" / "report.html").exists()
    assert "languages are not checked; to check them, pip install 'py3langid>=" in screen


@pytest.mark.parametrize("verb", ["compare", "pairs"])
def test_a_verb_without_its_packages_says_what_to_install(verb: str, ended: Ended) -> None:
    screen = ended.screen(verb)
    assert ended.codes[verb] == ExitCode.invalid, screen
    assert "to do:    pip install 'py3langid>=" in screen
    assert "Traceback" not in screen


def test_the_trainer_trains_without_the_rooms_above_it(assets: Path, tmp_path: Path) -> None:
    package = tmp_path / "dpo_dist"
    shutil.copytree(ROOT / "dpo_dist", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for room in ("tools", "compat", "trl"):
        shutil.rmtree(package / room)
    usual = [word for word in small_run(assets, tmp_path) if not word.startswith("samples.")]  # a tool's key
    words = [*usual, f"data.eval=[{assets}/eval.jsonl]", "trainer.max_steps=2"]
    for arguments in ([*words, "--check"], words, ["loss.kind=dpo"]):
        ended = subprocess.run(
            [sys.executable, "-m", "dpo_dist", "train", *arguments],
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        expected = ExitCode.invalid if arguments == ["loss.kind=dpo"] else ExitCode.completed
        assert ended.returncode == expected, ended.stderr[-3000:]
    run = RunFolder(tmp_path / "run")
    assert json.loads(run.summary.read_bytes())["exit"] == "completed"
    assert [row["step"] for row in stored_rows(run) if "loss" in row] == [1, 2]
    assert json.loads(run.last_evaluation.results.read_bytes())["all"]["eval_pairs"] > 0
    assert checkpoint_folders(run.checkpoints)
    assert AutoModelForCausalLM.from_pretrained(run.model).num_parameters() > 0
    assert not (package / "tools").exists()
