"""Ranks with and without images in a batch generate together what one process does."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import AutoModelForMultimodalLM

from dpo_dist.config.schema import Dtype, ImagesConfig, ModelConfig, ParallelismKind
from dpo_dist.distributed import zero
from dpo_dist.distributed.processes.world import Stops, World
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.tools.sampling.generate import Request, generate, generate_together
from dpo_dist.tools.sampling.settings import Sampling
from tests.dist.scenario import load_policy
from tests.support.invented_images import image_examples, image_reader, invented_images
from tests.support.ranks import run_ranks

STOPS = (2, 30, 31, 32)
GREEDY = Sampling(8, temperature=0)
# A rank beside one with an image: without an image in its batch; without a batch.
ASKED = ([0, 2], [1, 0, 3], [1, 2, 0, 2])


def requests(family: str, which: list[int]) -> list[Request]:
    examples = image_examples(invented_images(family))
    return [Request(examples[n].prompt_ids, f"{at}", 0, examples[n].images) for at, n in enumerate(which)]


def together(family: str, world: World, folder: Path) -> dict[str, Any]:
    """Generate with weights that are gathered for each forward."""
    model = ModelConfig(str(folder.parent / family), dtype=Dtype.fp32, images=ImagesConfig())
    policy, stops = load_policy(model, world), Stops(StopRequest(), world)
    with mock.patch.object(zero, "free_memory", return_value=0):
        found = [
            generate_together(policy, requests(family, which), GREEDY, STOPS, budget, stops)
            for which in ASKED
            for budget in (1, 10**6)
        ]
    return {"ids": [[sample.ids for sample in samples] for samples in found]}


@pytest.mark.parametrize("kind", [ParallelismKind.zero3, ParallelismKind.ddp])
def test_two_ranks_of_which_some_have_no_image_generate_what_one_process_does(
    kind: ParallelismKind, tmp_path: Path
) -> None:
    family = "gemma3" if kind is ParallelismKind.ddp else "qwen2_5_vl"
    image_reader(family).save_pretrained(tmp_path / family)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / family)
    wanted = [
        [sample.ids for sample in generate(model, requests(family, which), GREEDY, STOPS, 1)]
        for which in ASKED
        for _ in range(2)
    ]
    for rank in run_ranks(partial(together, family), 2, tmp_path / "ranks", kind, seconds=900):
        assert rank["ids"] == wanted
