"""Training does not need the rooms above it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.training.reporting.metrics_log import stored_rows
from tests.e2e.conftest import small_run
from tests.support.launch import ROOT, environment


def test_the_trainer_trains_without_the_rooms_above_it(assets: Path, tmp_path: Path) -> None:
    package = tmp_path / "dpo_dist"
    shutil.copytree(ROOT / "dpo_dist", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for room in ("tools", "compat", "trl"):
        shutil.rmtree(package / room)
    usual = [word for word in small_run(assets, tmp_path) if not word.startswith("sampling.")]  # a tool's key
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
