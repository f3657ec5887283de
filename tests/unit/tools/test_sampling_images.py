"""Prompts with images: a batch of padded rows gives what transformers gives for each row alone."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from dpo_dist.tools.sampling.generate import Request, Sample, generate
from dpo_dist.tools.sampling.settings import Sampling
from tests.support.invented_images import READERS, image_examples, image_reader, invented_images, own_inputs

pytestmark = pytest.mark.slow

STOPS = [2, 30]
GREEDY = Sampling(10, temperature=0)


def alone(model: Any, request: Request) -> Sample:
    """The response by transformers itself, from what a processor returns for this prompt."""
    ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=STOPS, pad_token_id=0)
    model.generation_config = GenerationConfig()
    inputs = own_inputs(model, ids, request.images)
    found = model.generate(ids, generation_config=config, **inputs)
    return Sample.from_tokens(found[0, ids.shape[1] :].tolist(), STOPS)


@pytest.mark.parametrize("name", READERS)
def test_a_batch_of_prompts_with_images_gives_the_responses_of_each_alone(name: str) -> None:
    model, examples = image_reader(name), image_examples(invented_images(name))
    asked = [Request(each.prompt_ids, str(at), 0, each.images) for at, each in enumerate(examples)]
    wanted = [alone(model, request) for request in asked]
    for budget in (10**6, 60):
        assert generate(model, asked, GREEDY, STOPS, budget) == wanted
