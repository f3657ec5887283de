"""All ranks ask as many prompts as rank 0 has time for, whatever their own clocks say."""

import functools
import time
from collections.abc import Callable, Sequence
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

PROMPTS = 5


def asked(slow_rank: int, world: World, folder: Path) -> int:
    """The prompts that are asked, with a response that takes 25 seconds by the clock of one rank."""
    config = RunConfig(model=ModelConfig("unused"), run=FolderConfig(dir=str(folder / "run")))
    run = Run(config, world, Console(None))
    world.on_main(lambda: run.folder.samples.mkdir(parents=True))
    late = 0.0

    def generate(_engine: Any, requests: Sequence[Request], *_: Any, **__: Any) -> list[Sample]:
        nonlocal late
        late += 25.0 if world.rank == slow_rank else 0.0
        return world.on_main(lambda: [Sample([5], None) for _ in requests])

    def clock(real: Callable[[], float] = time.monotonic) -> float:
        return real() + late

    request = Request(np.array([1], np.int32), "id", 0)
    prompts = tuple(SamplePrompt(request, {"prompt_id": str(number)}) for number in range(PROMPTS))
    qwen = tiny.qwen()
    stops = frozenset(qwen.all_special_ids)
    own = RunSamples(run, Sampling(4), prompts, stops, qwen, at_every_evaluation=False)
    with (
        mock.patch.object(time, "monotonic", clock),
        mock.patch.object(samples, "generate_together", generate),
    ):
        own.ask_reference(FrozenEngine.__new__(FrozenEngine))
    assert own.reference is not None
    return len(own.reference)


@pytest.mark.parametrize(("slow_rank", "expected"), [(0, 2), (1, PROMPTS)])
def test_the_clock_of_rank_0_decides_for_all_ranks(slow_rank: int, expected: int, tmp_path: Path) -> None:
    assert run_ranks(functools.partial(asked, slow_rank), 2, tmp_path / "ranks") == [expected] * 2
