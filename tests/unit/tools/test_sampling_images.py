"""Prompts with images: a batch of padded rows gives what transformers gives for each row alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from dpo_dist.batching.example import ImageInput
from dpo_dist.tools.shared.sampling.generate import Request, Sample, generate
from dpo_dist.tools.shared.sampling.settings import Sampling
from tests.support.multimodal import image_model

IMAGE = 5
STOPS = [2, 30]
GREEDY = Sampling(10, temperature=0)


def patches(vision: Any, number: int) -> tuple[dict[str, Tensor], int]:
    height, width = [(4, 6), (2, 4), (6, 2)][number]
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, height, width]])
    return {"pixel_values": torch.randn(height * width, values), "image_grid_thw": grid}, height * width // 4


def squares(
    tokens: int, size: int = 28, **more: Tensor
) -> Callable[[Any, int], tuple[dict[str, Tensor], int]]:
    return lambda _vision, _number: ({"pixel_values": torch.randn(1, 3, size, size), **more}, tokens)


def pooled(vision: Any, number: int) -> tuple[dict[str, Tensor], int]:
    height, width = [(6, 3), (3, 3), (3, 6)][number]
    places = torch.full((1, 18, 2), -1)
    places[0, : height * width] = torch.cartesian_prod(torch.arange(width), torch.arange(height))
    pixels = torch.rand(1, 18, 3 * vision.patch_size**2) * (places[..., :1] >= 0)
    return {"pixel_values": pixels, "image_position_ids": places}, height * width // 9


FAMILIES: dict[str, Callable[[Any, int], tuple[dict[str, Tensor], int]]] = {
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm46v", "qwen3_5"), patches),
    "gemma3": squares(4),
    "gemma4": pooled,
    "internvl": squares(1),
    "llava": squares(4),
    "mistral3": squares(4, 56, image_sizes=torch.tensor([[56, 56]])),
}


def requests(model: Any, family: str) -> list[Request]:
    """Prompts with one image, two images, none, and an image of another prompt again."""
    torch.manual_seed(3)
    random = np.random.default_rng(3)
    images = []
    for number in range(3):
        inputs, tokens = FAMILIES[family](model.config.vision_config, number)
        images.append(ImageInput(bytes([number]) * 16, tokens, inputs))

    def request(*parts: int | ImageInput) -> Request:
        pieces = [
            np.full(part.tokens, IMAGE) if isinstance(part, ImageInput) else random.integers(31, 99, part)
            for part in parts
        ]
        used = tuple(part for part in parts if isinstance(part, ImageInput))
        return Request(np.concatenate(pieces).astype(np.int32), str(parts), 0, used)

    one, two, three = images
    return [request(5, one, 7), request(3, two, 2, three, 1), request(9), request(2, one, 3)]


def alone(model: Any, request: Request) -> Sample:
    """The response by transformers itself, from what a processor returns for this prompt."""
    ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
    inputs: dict[str, Tensor] = {}
    if request.images:
        names = request.images[0].inputs
        inputs = {name: torch.cat([image.inputs[name] for image in request.images]) for name in names}
    if hasattr(model.model, "get_rope_index") or model.config.model_type == "gemma4":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if model.config.model_type == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).int()
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=STOPS, pad_token_id=0)
    model.generation_config = GenerationConfig()
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **inputs)
    return Sample.from_tokens(found[0, ids.shape[1] :].tolist(), STOPS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_prompts_with_images_gives_the_responses_of_each_alone(family: str) -> None:
    model = image_model(family, 100)
    asked = requests(model, family)
    wanted = [alone(model, request) for request in asked]
    for budget in (10**6, 60, 1):
        assert generate(model, asked, GREEDY, STOPS, budget) == wanted
    blind = [Request(request.prompt_ids, request.key, 0, request.images[::-1]) for request in asked]
    assert generate(model, blind[1:2], GREEDY, STOPS, 1)[0] != wanted[1] or family == "internvl"
