"""Rounds by real commands: the judge's score rises with a round, also across SIGTERM."""

import json
import os
import shlex
import signal
from pathlib import Path

from dpo_dist.config.load import load_run_config
from dpo_dist.tools.pairs.rounds import run_rounds
from tests.support.invented import write_pairs
from tests.support.launch import run_verb, running, wait_until
from tests.support.tiny_model import write_model
from tests.support.warm_launch import fork_python


def warm(command: str) -> int:
    """Run a round's command on a process forked from the warm parent."""
    words = shlex.split(command)
    ended = run_verb(words[3], words[4:])
    print(ended.output)
    return ended.code


def test_scores_rise_with_a_round_across_sigterm(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "prompts.jsonl", 24)
    overrides = [
        *(f"model.path={tmp_path}/model", "model.dtype=fp32", f"data.train=[{tmp_path}/prompts.jsonl]"),
        *(f"run.dir={tmp_path}/run", f"reference.store={tmp_path}/store", f"data.cache={tmp_path}/encoded"),
        *("pairs.method=samples", "pairs.function=tests.support.own_judge:letter_shares", "pairs.rounds=1"),
        *("sampling.max_new_tokens=8", "pairs.unfinished=keep", "pairs.samples=6"),
        *("optim.lr=2e-2", "trainer.global_batch_pairs=12", "trainer.epochs=4", "trainer.save_every=0"),
        *("parallelism=ddp", "tracking=off"),
    ]
    part, result = "rounds/1/pairs/parts/responses-*/000000.jsonl", tmp_path / "run/rounds/1/round.json"
    with running("pairs", overrides, tmp_path / "screen.txt", prepare=fork_python) as process:
        wait_until(lambda: list((tmp_path / "run").glob(part)), process)
        os.kill(process.pid, signal.SIGTERM)
        process.join(240)
        assert process.exitcode == 143
    [done] = (tmp_path / "run").glob(part)
    written = done.stat().st_mtime_ns
    assert not result.exists()

    said: list[str] = []
    assert run_rounds(load_run_config(overrides), said.append, warm) == 0
    assert done.stat().st_mtime_ns == written
    rounds = json.loads((tmp_path / "run/rounds/rounds.json").read_text())["rounds"]
    before, after = (row["samples"]["mean_score"] for row in rounds)
    assert before + 0.02 < after
    assert Path(said[-1].partition(": ")[2], "config.json").is_file()
