"""A run that is killed again and again, at seeded random places, ends as the uninterrupted one (law L4)."""

import random
import shutil
from pathlib import Path
from unittest import mock

import pytest

from tests.e2e.conftest import small_run
from tests.support import warm
from tests.support.killed_runs import KillPoint, assert_same_run
from tests.support.launch import Finished, run_verb

KILLS = 6
REACH = 0.7  # the part of a whole run, in file operations, in which a start is killed
LONGEST_DELAY = 0.03  # seconds after the fatal operation; in half of the kills none
STEPS = ["trainer.epochs=2", "trainer.save_every=1", "trainer.log_every=1", "optim.lr=1e-3"]
SAMPLES = ["trainer.eval_every=3", "samples.prompts=2", "samples.max_new_tokens=4"]
DORA = "model.adapter={r: 4, alpha: 8, variant: dora}"


@pytest.mark.parametrize(
    ("processes", "extra"),
    [
        pytest.param(1, ["data.eval=[{assets}/eval.jsonl]", *SAMPLES], id="fp32, samples"),
        pytest.param(2, ["model.dtype=bf16", DORA], id="bf16, DoRA, two processes"),
    ],
)
def test_runs_killed_anywhere_end_as_the_uninterrupted_one(
    processes: int, extra: list[str], assets: Path, tmp_path: Path
) -> None:
    options = [
        *STEPS,
        "parallelism.kind=zero3",
        *(option.replace("{assets}", str(assets)) for option in extra),
    ]

    def start(point: KillPoint) -> Finished:
        point.folder.mkdir(exist_ok=True)
        point.forget_former_start()
        own = [*small_run(assets, point.folder), f"data.cache={point.folder}/encoded", *options]
        # As short as a launcher's: what the ranks that are left say is not looked at.
        with mock.patch.object(warm, "GRACE_AFTER_KILL_SECONDS", 0.5):
            return run_verb("train", own, processes=processes, prepare=point.arm, seconds=400)

    whole, drawn = KillPoint(tmp_path / "whole"), random.Random(1)
    ended = start(whole)
    assert ended.code == 0, ended.output
    operations = [max(1, int(whole.counted(rank) * REACH)) for rank in range(processes)]
    kills = runs = 0
    while kills < KILLS:
        folder, runs = tmp_path / f"killed-{runs}", runs + 1
        while True:
            rank = drawn.randrange(processes)
            point = KillPoint(
                folder,
                operation=drawn.randint(1, operations[rank]) if kills < KILLS else 0,
                rank=rank,
                delay=drawn.choice([0.0, drawn.uniform(0, LONGEST_DELAY)]),
                everybody=drawn.random() < 0.7,
            )
            if (ended := start(point)).code == 0:
                break
            assert point.is_reached, ended.output  # else it was not killed, but refused or wrong
            assert "Traceback" not in ended.output, ended.output
            kills += 1
        assert_same_run(folder, whole.folder)
        shutil.rmtree(folder)
