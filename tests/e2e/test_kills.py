"""A run that is killed again and again, at seeded random places, ends as the uninterrupted one (law L4)."""

from pathlib import Path

import pytest

from tests.e2e.conftest import small_run
from tests.support.killed_runs import KilledRuns

KILLS = 6
STEPS = ["trainer.epochs=2", "trainer.save_every=1", "trainer.log_every=1", "optim.lr=1e-3"]
SAMPLES = ["trainer.eval_every=3", "samples.prompts=2", "samples.max_new_tokens=4"]
ADAPTER = "model.adapter={r: 4, alpha: 8, variant: %s}"

CASES = [
    pytest.param(1, ["parallelism.kind=zero3", *SAMPLES], id="fp32, samples"),
    pytest.param(2, ["parallelism.kind=ddp", "model.dtype=bf16", ADAPTER % "lora"], id="bf16, LoRA, ddp"),
    pytest.param(2, ["parallelism.kind=zero3", ADAPTER % "dora"], id="fp32, DoRA, zero3"),
]


@pytest.mark.parametrize(("processes", "extra"), CASES)
def test_runs_killed_anywhere_end_as_the_uninterrupted_one(
    processes: int, extra: list[str], assets: Path, tmp_path: Path
) -> None:
    evaluated = [f"data.eval=[{assets}/eval.jsonl]"] if extra[-1] == SAMPLES[-1] else []

    def overrides(folder: Path) -> list[str]:
        return [*small_run(assets, folder), f"data.cache={folder}/encoded", *STEPS, *extra, *evaluated]

    KilledRuns(tmp_path, overrides, processes, seed=1, kills=KILLS).check()
