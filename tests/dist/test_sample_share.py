"""All ranks skip the samples of an evaluation together, whatever their own clocks say."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from dpo_dist.config.schema import FolderConfig, ModelConfig, RunConfig
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import FrozenEngine
from dpo_dist.foundation.console import Console
from dpo_dist.tools.report import samples
from dpo_dist.tools.report.samples import RunSamples, SamplePrompt
from dpo_dist.tools.sampling.generate import Request, Sample
from dpo_dist.tools.sampling.settings import Sampling
from dpo_dist.training.start.open_run import Run
from tests.support import tiny
from tests.support.ranks import run_ranks


def evaluations(slow_rank: int, world: World, folder: Path) -> list[list[float]]:
    """The evaluations with samples: two, of which the second is after a minute of samples on one rank."""
    config = RunConfig(model=ModelConfig("unused"), run=FolderConfig(dir=str(folder / "run")))
    run = Run(config, world, Console(None))
    world.on_main(lambda: run.folder.samples.mkdir(parents=True))
    late = 0.0

    def generate(*_: Any, **__: Any) -> list[Sample]:
        nonlocal late
        late += 61.0 if world.rank == slow_rank else 0.0
        return world.on_main(lambda: [Sample([5], None)])

    def clock(real: Callable[[], float] = time.monotonic) -> float:
        return real() + late

    prompt = SamplePrompt(Request(np.array([1], np.int32), "id", 0), {"prompt_id": "id", "chosen": "Yes."})
    asked = RunSamples(run, Sampling(4), (prompt,), frozenset(tiny.qwen().all_special_ids), tiny.qwen())
    policy = FrozenEngine.__new__(FrozenEngine)
    with (
        mock.patch.object(time, "monotonic", clock),
        mock.patch.object(samples, "generate_together", generate),
    ):
        found = [asked.write_responses(step, policy, is_last=False) for step in (0, 1)]
    return [sorted(each.values()) for each in found]


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_the_clock_of_rank_0_decides_for_all_ranks(slow_rank: int, tmp_path: Path) -> None:
    first, second = run_ranks(functools.partial(evaluations, slow_rank), 2, tmp_path / "ranks")
    assert first == second
    assert [bool(values) for values in first] == [True, slow_rank == 1]
