"""What a run prints: JSON objects with its verdict; a reader that goes away, and Ctrl-C on a terminal."""

import json
import os
import pty
import re
import select
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Overrides
from tests.support.launch import ROOT, TWO_PROCESSES, environment, history, run_verb, summary
from tests.support.warm import launcher_variables, start_verb, wait

FIELDS = {
    "message": {"level", "text"},
    "progress": {"work", "done", "total", "unit", "share", "seconds_left"},
    "error": {"message"},
}


def objects(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [each for each in found if not {"time", *FIELDS.get(each["kind"], ())} <= each.keys()] == []
    return found


def test_a_run_prints_json_objects_only(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    """Standard output and error together: messages, rows with all their metrics, the summary; and errors.

    The verdict names what is wrong with the data: those of evaluation are those of training, and all are cut.
    """
    evaluated = (f"data.eval=[{assets}/train.jsonl]", "trainer.eval_every=2", "console.style=json")
    cut = ("data.max_length=40", "data.max_prompt_length=30", "data.truncation=keep_start")
    ended = run_verb("train", overrides(*evaluated, *cut, "data.max_bad_share=1"))
    assert ended.code == 0, ended.output
    found = objects(ended.output)
    assert {each["kind"] for each in found} == {"message", "progress", "step", "evaluation", "summary"}
    rows = [each for each in found if each["kind"] in ("step", "evaluation")]
    for row, printed in zip(history(tmp_path / "run"), rows, strict=True):
        assert row.items() <= printed.items()
    last = found[-1]
    assert (last["run_dir"], last["exit"]) == (str(tmp_path / "run"), "completed")
    judged = summary(tmp_path / "run")["verdict"]
    assert last["verdict"] == judged
    assert judged["sentence"].startswith("evaluation data leaked into training: ")
    texts = {finding["rule"]: finding["text"] for finding in judged["findings"]}
    assert "(100 %) have a prompt that is also in the training data" in texts["evaluation_leak"]
    assert "have a response whose end data.max_length cuts" in texts["data_faults"]

    refused = run_verb("train", overrides(*evaluated, "loss.beta=0"))
    [error] = objects(refused.output)
    shown = [error[name] for name in ("kind", "where", "code")]
    assert shown == ["error", "command line: loss.beta=0", refused.code]
    diverging = ("optim.weight_decay=1e38", f"run.dir={tmp_path}/other")
    diverged = run_verb("train", overrides(*evaluated, *diverging))
    assert [each["kind"] for each in objects(diverged.output)][-2:] == ["summary", "error"]


def test_a_reader_that_goes_away_does_not_end_a_run(overrides: Overrides, tmp_path: Path) -> None:
    """Of two processes, which print to the same pipe."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    variables = environment() | launcher_variables(TWO_PROCESSES)
    ranks = start_verb("train", overrides(), variables, 2, ROOT, pipe)
    with pipe.open() as reader:
        assert next(line for line in reader if "run directory: " in line)
    assert wait(ranks, 240) == 0
    assert summary(tmp_path / "run")["exit"] == "completed"


def test_ctrl_c_on_a_terminal_leaves_it_in_order(
    overrides: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves, its messages are on lines of their own, and the cursor was never hidden."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    endless = overrides("trainer.max_steps=100000", "trainer.log_every=0")
    [process] = start_verb("train", endless, environment(), 1, ROOT, Path(os.ttyname(slave)))
    shown, asked, deadline = "", False, time.monotonic() + 240
    while process.is_alive() and time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 10_000).decode()
        if "step 1/" in shown and not asked:
            os.kill(process.pid, signal.SIGINT)
            asked = True
    process.kill()
    while select.select([master], [], [], 0.2)[0]:
        shown += os.read(master, 10_000).decode()
    assert process.exitcode == 75, shown
    assert "\x1b[2K" in shown
    assert "\x1b[?25l" not in shown
    assert re.search(r"stopping after step \d+, with a checkpoint: SIGINT\r\n", shown), shown[-3000:]
    assert shown.endswith("\r\n")
    assert "Traceback" not in shown
