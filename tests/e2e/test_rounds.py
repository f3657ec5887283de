"""Rounds by real commands: the judge's score rises round by round, also across SIGTERM."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.generation.pairs.rounds import run_rounds
from tests.support.invented import write_pairs
from tests.support.launch import ROOT, environment, run_verb
from tests.support.tiny_model import write_model


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "prompts.jsonl", 48)
    return [
        *(f"model.path={tmp_path}/model", "model.dtype=fp32", f"data.train=[{tmp_path}/prompts.jsonl]"),
        *(f"run.dir={tmp_path}/run", f"reference.store={tmp_path}/store", f"data.cache={tmp_path}/encoded"),
        *("pairs.method=samples", "pairs.function=tests.support.own_judge:letter_shares", "pairs.rounds=2"),
        *("pairs.max_new_tokens=8", "pairs.unfinished=keep", "pairs.samples=6"),
        *("optim.lr=2e-2", "trainer.global_batch_pairs=16", "trainer.epochs=4", "trainer.save_every=0"),
        *("parallelism=ddp", "tracking=off", f"pairs.launcher='{sys.executable}'"),
    ]


def warm(command: Sequence[str], _: Path) -> int:
    """Run a round's command on a process forked from the warm parent."""
    ended = run_verb(command[2].rpartition(".")[2], list(command[3:]))
    print(ended.output)
    return ended.code


def test_scores_rise_round_by_round_across_sigterm(overrides, tmp_path) -> None:
    parts = tmp_path / "run/rounds/1/pairs/parts"
    with subprocess.Popen(
        [sys.executable, "-m", "dpo_dist.pairs", *overrides],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
    ) as process:
        deadline = time.monotonic() + 120
        while not (done := list(parts.glob("responses-*/000000.jsonl"))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        process.communicate(timeout=240)
    assert process.returncode == 143
    written = done[0].stat().st_mtime_ns
    assert not (tmp_path / "run/rounds/1/round.json").exists()

    said: list[str] = []
    assert run_rounds(load_run_config(overrides), said.append, warm) == 0
    assert done[0].stat().st_mtime_ns == written
    rounds = json.loads((tmp_path / "run/rounds/rounds.json").read_text())["rounds"]
    means = [row["samples"]["mean_score"] for row in rounds]
    assert len(means) == 3
    assert means[0] + 0.02 < means[1] < means[2] - 0.02, means
    assert "2" in said[-1]
    assert Path(said[-1].partition(": ")[2], "config.json").is_file()
