"""A run that is killed again and again, at seeded random places, ends as the uninterrupted one (law L4)."""

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.e2e.conftest import small_run
from tests.support import warm
from tests.support.killed_runs import assert_same_run
from tests.support.launch import Finished, run_verb

KILLS = 4
REACH = 0.7  # the part of a whole run, in file operations, in which a start is killed
STEPS = ["trainer.max_steps=5", "trainer.save_every=1", "trainer.log_every=1", "optim.lr=1e-3"]
SAMPLES = ["trainer.eval_every=3", "sampling.prompts=2", "sampling.max_new_tokens=4"]
DORA = "model.adapter={r: 4, alpha: 8, variant: dora}"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class KillPoint:
    """The file operation before which a process is killed, which no clock decides.

    Attributes:
        folder: operations below it are counted.
        operation: the number of the fatal one; 0: none, they are only counted.
        rank: of the process that is killed there; a launcher ends the others half a second later.
    """

    folder: Path
    operation: int = 0
    rank: int = 0

    def start(self, command: list[str], processes: int) -> Finished:
        """Train to the end or to this point."""
        with mock.patch.object(warm, "GRACE_AFTER_KILL_SECONDS", 0.5):
            return run_verb("train", command, processes=processes, prepare=self.arm, seconds=900)

    def pluralize(self, rank: int) -> int:
        return int((self.folder / f"operations-{rank}").read_text())

    def arm(self) -> None:
        """Count in this process from now on."""
        rank = int(os.environ.get("RANK", "0"))
        record = os.open(self.folder / f"operations-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        beginning, fatal, count = f"{self.folder}{os.sep}", self.operation if rank == self.rank else 0, 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            changes = event in CHANGES or (event == "open" and arguments[2] & WRITING)
            if not changes or isinstance(arguments[0], int):
                return
            if os.fsdecode(arguments[0]).startswith(beginning):
                count += 1
                os.pwrite(record, str(count).encode(), 0)
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("processes", "extra"),
    [
        pytest.param(1, ["data.eval=[{assets}/eval.jsonl]", *SAMPLES], id="fp32, samples"),
        pytest.param(2, ["model.dtype=bf16", "optim=adamw_bf16", DORA], id="8 bytes, DoRA, two processes"),
    ],
)
def test_runs_killed_anywhere_end_as_the_uninterrupted_one(
    processes: int, extra: list[str], assets: Path, tmp_path: Path
) -> None:
    options = [*STEPS, "parallelism.kind=zero3", *(one.replace("{assets}", str(assets)) for one in extra)]

    def command(folder: Path) -> list[str]:
        return [*small_run(assets, folder), f"data.cache={folder}/encoded", *options]

    whole, drawn = KillPoint(tmp_path / "whole"), random.Random(processes)
    whole.folder.mkdir()
    ended = whole.start(command(whole.folder), processes)
    assert ended.code == 0, ended.output
    operations = [max(1, int(whole.pluralize(rank) * REACH)) for rank in range(processes)]
    kills = runs = 0
    while kills < KILLS:
        folder, runs = tmp_path / f"killed-{runs}", runs + 1
        folder.mkdir()
        while True:
            rank = drawn.randrange(processes)
            operation = drawn.randint(1, operations[rank]) if kills < KILLS else 0
            point = KillPoint(folder, operation, rank)
            if (ended := point.start(command(folder), processes)).code == 0:
                break
            # Else it was not killed, but refused or wrong.
            assert point.pluralize(rank) >= operation, ended.output
            assert "Traceback" not in ended.output, ended.output
            kills += 1
            time.sleep(1)  # files of a dead writer are removed a second after their last change, or later
        assert_same_run(folder, whole.folder)
        shutil.rmtree(folder)
