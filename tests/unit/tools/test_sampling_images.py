"""Prompts with images: a batch of padded rows gives what transformers gives for each row alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from dpo_dist.tools.shared.sampling.generate import Request, Sample, generate
from dpo_dist.tools.shared.sampling.settings import Sampling
from tests.support.invented_images import IMAGE_TOKEN, READERS, image_examples, image_reader, invented_images

STOPS = [2, 30]
GREEDY = Sampling(10, temperature=0)
# The inputs of a processor beside ids and pixels, by model.
KINDS = {"gemma3": "token_type_ids", "paligemma": "token_type_ids", "gemma4": "mm_token_type_ids"}


def alone(model: Any, request: Request) -> Sample:
    """The response by transformers itself, from what a processor returns for this prompt."""
    ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
    inputs: dict[str, Tensor] = {}
    for name in request.images[0].inputs if request.images else ():
        parts = [image.inputs[name] for image in request.images]
        sizes = [max(part.shape[dim] for part in parts) for dim in range(1, parts[0].dim())]
        joined = parts[0].new_zeros(sum(map(len, parts)), *sizes)
        for row, part in zip(np.cumsum([0, *map(len, parts)])[:-1].tolist(), parts, strict=True):
            joined[(slice(row, row + len(part)), *map(slice, part.shape[1:]))] = part
        inputs[name] = joined
    kind = model.config.model_type
    if name := "mm_token_type_ids" if hasattr(model.model, "get_rope_index") else KINDS.get(kind):
        inputs[name] = (ids == IMAGE_TOKEN).int()
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=STOPS, pad_token_id=0)
    model.generation_config = GenerationConfig()
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **inputs)
    return Sample.from_tokens(found[0, ids.shape[1] :].tolist(), STOPS)


@pytest.mark.parametrize("name", READERS)
def test_a_batch_of_prompts_with_images_gives_the_responses_of_each_alone(name: str) -> None:
    model, examples = image_reader(name), image_examples(invented_images(name))
    asked = [Request(each.prompt_ids, str(at), 0, each.images) for at, each in enumerate(examples)]
    wanted = [alone(model, request) for request in asked]
    for budget in (10**6, 60, 1):
        assert generate(model, asked, GREEDY, STOPS, budget) == wanted
