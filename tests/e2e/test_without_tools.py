"""Training needs no package of the extra `tools`; a verb that needs one says how to install it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.errors import ExitCode
from tests.e2e.conftest import Overrides
from tests.support.launch import ROOT, environment

EXTRA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tools"]
IMPORTED_AS = {"scikit-learn": "sklearn"}
WITHOUT = """
import runpy, sys
sys.modules |= dict.fromkeys({hidden})  # as if they were not installed
import dpo_dist.api
sys.argv[0] = {module!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def without_tools(verb: str, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a verb in a process that cannot import the packages of the extra."""
    names = [requirement.partition(">=")[0] for requirement in EXTRA]
    hidden = [IMPORTED_AS.get(name, name) for name in names]
    program = WITHOUT.format(hidden=hidden, module=VERBS[verb].module)
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )


def test_training_samples_and_its_page_need_no_package_of_the_tools(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    held_out = [f"data.eval=[{assets}/eval.jsonl]", "samples.prompts=2", "trainer.max_steps=2"]
    ended = without_tools("train", overrides(*held_out), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert "languages are not checked; to check them, pip install 'dpo-dist[tools]'" in ended.stderr


@pytest.mark.parametrize("verb", ["doctor", "compare", "pairs"])
def test_a_verb_without_its_packages_says_what_to_install(
    verb: str, overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    words = overrides()
    if verb == "compare":
        words = [f"compare.models=[{assets}/model,b={assets}/model]", f"data.eval=[{assets}/eval.jsonl]"]
    if verb == "pairs":  # before its page is served
        words = [f"data.train=[{assets}/train.jsonl]", "pairs.method=people"]
    ended = without_tools(verb, words, tmp_path)
    assert ended.returncode == ExitCode.invalid, ended.stderr
    assert "to do:    pip install 'dpo-dist[tools]'" in ended.stderr
    assert "Traceback" not in ended.stderr
