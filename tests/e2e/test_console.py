"""What a run prints: JSON objects for programs; a reader that goes away, and Ctrl-C on a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Overrides
from tests.support.launch import ROOT, command, environment, history, run_verb, summary


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_prints_json_objects_only(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    """Standard output and error together: messages, rows with all their metrics, the summary; and errors."""
    evaluated = (f"data.eval=[{assets}/eval.jsonl]", "trainer.eval_every=2", "console.style=json")
    ended = run_verb("train", overrides(*evaluated))
    assert ended.code == 0, ended.output
    found = objects(ended.output)
    assert {each["kind"] for each in found} == {"message", "progress", "step", "evaluation", "summary"}
    rows = [each for each in found if each["kind"] in ("step", "evaluation")]
    for row, printed in zip(history(tmp_path / "run"), rows, strict=True):
        assert row.items() <= printed.items()
    last = found[-1]
    assert (last["run_dir"], last["exit"]) == (str(tmp_path / "run"), "completed")
    assert last["verdict"] == summary(tmp_path / "run")["verdict"]

    refused = run_verb("train", overrides(*evaluated, "loss.beta=0"))
    [error] = objects(refused.output)
    assert (error["kind"], error["where"], error["exit_code"]) == (
        "error",
        "command line: loss.beta=0",
        refused.code,
    )
    diverged = run_verb("train", overrides(*evaluated, "optim.lr=1e30", f"run.dir={tmp_path}/other"))
    assert [each["kind"] for each in objects(diverged.output)][-2:] == ["error", "summary"]


def test_a_reader_that_goes_away_does_not_end_a_run(overrides: Overrides, tmp_path: Path) -> None:
    """With the launcher, whose processes print to the same pipe."""
    run = command("train", overrides("tracking.wandb=off"), 2)
    shell = ["bash", "-c", 'set -o pipefail; "$@" 2>&1 | grep --line-buffered -m 1 "run dir"', "-", *run]
    ended = subprocess.run(
        shell, cwd=ROOT, env=environment() | {"LC_ALL": "C"}, capture_output=True, text=True, check=False
    )
    assert ended.stdout.count("\n") == 1
    assert "run directory: " in ended.stdout
    assert ended.returncode == 0, ended.stderr
    assert summary(tmp_path / "run")["exit"] == "completed", ended.stderr


def test_ctrl_c_on_a_terminal_leaves_it_in_order(overrides: Overrides) -> None:
    """The run saves, its messages are on lines of their own, and the cursor was never hidden."""
    master, slave = pty.openpty()
    settings = environment() | {"TERM": "xterm"}
    endless = overrides("trainer.max_steps=100000", "trainer.log_every=0")
    with subprocess.Popen(
        command("train", endless, 1), cwd=ROOT, env=settings, stdin=slave, stdout=slave, stderr=slave
    ) as process:
        shown, asked, deadline = "", False, time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                shown += os.read(master, 10_000).decode()
            if "step 1/" in shown and not asked:
                process.send_signal(signal.SIGINT)
                asked = True
        process.kill()
    while select.select([master], [], [], 0.2)[0]:
        shown += os.read(master, 10_000).decode()
    assert process.returncode == 75, shown
    assert "\x1b[2K" in shown
    assert "\x1b[?25l" not in shown
    assert re.search(r"stopping after step \d+, with a checkpoint: SIGINT\r\n", shown), shown[-3000:]
    assert shown.endswith("\r\n")
    assert "Traceback" not in shown
