"""Small models that really read images, and invented images for them, as their processors would make them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from dpo_dist.data.example import Example, ImageInput, TokenIds
from tests.support.families import DELTA, EXPERTS
from tests.support.multimodal import PIXELS, PLACE, PLACES, QWEN, ROPE, SHARED_KEYS, TEXT, VISION, whole_model

VOCABULARY = 97
IMAGE_TOKEN = 5
# The inputs of a processor beside ids and pixels, by model.
_KINDS = {"gemma3": "token_type_ids", "paligemma": "token_type_ids", "gemma4": "mm_token_type_ids"}
MakeImage = Callable[[int, torch.Generator], ImageInput]


def patches(number: int, generator: torch.Generator) -> ImageInput:
    """An image of a tower of native resolution: patches in a flat list, and their grid."""
    rows, columns = [(2, 4), (6, 2), (4, 4)][number]
    pixels = torch.randn(rows * columns, 3 * 2 * 14 * 14, generator=generator)
    grid = torch.tensor([[1, rows, columns]])
    return ImageInput(
        bytes([number]) * 16,
        rows * columns // 4,
        IMAGE_TOKEN,
        {"pixel_values": pixels, "image_grid_thw": grid},
    )


def squares(tokens: int, *shape: int) -> MakeImage:
    def make(number: int, generator: torch.Generator) -> ImageInput:
        pixels = torch.randn(1, *shape, 3, 28, 28, generator=generator)
        return ImageInput(bytes([number]) * 16, tokens, IMAGE_TOKEN, {"pixel_values": pixels})

    return make


def tiles(number: int, generator: torch.Generator) -> ImageInput:
    """An image in one or several tiles."""
    count = number + 1
    pixels = torch.randn(count, 3, 28, 28, generator=generator)
    return ImageInput(bytes([number]) * 16, count, IMAGE_TOKEN, {"pixel_values": pixels})


def stacked_tiles(number: int, generator: torch.Generator) -> ImageInput:
    """The same, in a dimension of its own."""
    one = tiles(number, generator)
    return replace(one, inputs={"pixel_values": one.inputs["pixel_values"][None]})


def unpadded_tiles(number: int, generator: torch.Generator) -> ImageInput:
    """An image in a small tile and in several, whose features have an end of each line."""
    height, width = [(28, 56), (56, 28), (56, 56)][number]
    count = 1 + height * width // 28**2
    rows, columns = height // 14, width // 14
    pixels = torch.randn(1, count, 3, 28, 28, generator=generator)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    return ImageInput(bytes([number]) * 16, 4 + rows * (columns + 1), IMAGE_TOKEN, inputs)


def rectangles(number: int, generator: torch.Generator) -> ImageInput:
    """An image of any size, padded to the largest of a batch."""
    height, width = [(28, 56), (56, 28), (28, 28)][number]
    pixels = torch.randn(1, 3, height, width, generator=generator)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    return ImageInput(bytes([number]) * 16, height * width // 28**2, IMAGE_TOKEN, inputs)


def pooled_patches(number: int, generator: torch.Generator) -> ImageInput:
    """An image of Gemma 4: a fixed number of patches with their places, of which some are none."""
    rows, columns = [(6, 6), (3, 3), (3, 6)][number]
    places = torch.full((1, 36, 2), -1)
    x, y = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
    places[0, : rows * columns] = torch.stack((x, y), dim=-1).view(-1, 2)
    pixels = torch.rand(1, 36, 3 * 14 * 14, generator=generator) * (places >= 0).all(-1, keepdim=True)
    inputs = {"pixel_values": pixels, "image_position_ids": places}
    return ImageInput(bytes([number]) * 16, rows * columns // 9, IMAGE_TOKEN, inputs)


@dataclass(frozen=True)
class Reader:
    """Options of a small model's text part, of its tower and of itself, and its images."""

    text: dict[str, Any]
    vision: dict[str, Any]
    options: dict[str, Any]
    image: MakeImage = patches
    model_type: str = ""


GRID = QWEN | {"patch_size": 14}
SQUARE = VISION | PIXELS
GEMMA4 = VISION | {"head_dim": 8, "num_key_value_heads": 2, "patch_size": 14, "pooling_kernel_size": 3}
# A full layer is before the last, as what image tokens read in the last layer has no effect, and the last is
# one, as a window hides images from the response. Windows are shorter than an image.
MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 3}
MIXED |= {"num_hidden_layers": 3}
GEMMA4_TEXT = TEXT | SHARED_KEYS | {"layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA4_TEXT |= {"num_hidden_layers": 4, "vocab_size_per_layer_input": VOCABULARY, "sliding_window": 3}
STACKED = GRID | {"depth": 2, "deepstack_visual_indexes": [0, 1]}
LLAMA, COHERE = TEXT | {"model_type": "llama"}, TEXT | {"model_type": "cohere2", "sliding_window": 6}
CLIP = SQUARE | {"model_type": "clip_vision_model", "projection_dim": 16, "num_hidden_layers": 2}
PINPOINTS = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
OVIS = {"hidden_stride": 2, "vocab_size": 24, "num_visual_indicator_tokens": 5}
READERS = {
    "gemma3": Reader(TEXT | MIXED, SQUARE, PLACE | {"mm_tokens_per_image": 4}, squares(4)),
    "gemma4": Reader(GEMMA4_TEXT, GEMMA4, PLACES | {"audio_config": None}, pooled_patches),
    "gemma4 vision": Reader(
        GEMMA4_TEXT | {"use_bidirectional_attention": "vision"},
        GEMMA4,
        PLACES | {"audio_config": None},
        pooled_patches,
        "gemma4",
    ),
    "glm46v": Reader(TEXT | ROPE, GRID | {"image_size": 112}, PLACES),
    "internvl": Reader(
        TEXT | {"model_type": "qwen3"},
        VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        PLACES,
        tiles,
    ),
    "llava": Reader(LLAMA, CLIP, PLACE, squares(4)),
    "mistral3": Reader(
        TEXT | {"model_type": "mistral"},
        VISION | {"model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 8},
        PLACE,
        rectangles,
    ),
    "qwen2_vl": Reader(
        TEXT | ROPE,
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2},
        PLACES,
    ),
    "qwen2_5_vl": Reader(TEXT | ROPE, GRID | {"fullatt_block_indexes": [0], "window_size": 56}, PLACES),
    "qwen3_5": Reader(TEXT | DELTA | ROPE, GRID, PLACES),
    "qwen3_5_moe": Reader(
        TEXT | DELTA | ROPE | EXPERTS | {"shared_expert_intermediate_size": 16}, GRID, PLACES
    ),
    "qwen3_vl": Reader(TEXT | ROPE, STACKED, PLACES),
    "qwen3_vl_moe": Reader(TEXT | ROPE | EXPERTS, STACKED, PLACES),
    "aya_vision": Reader(COHERE, SQUARE, PLACES | {"downsample_factor": 2}, tiles),
    "cohere2_vision": Reader(COHERE, SQUARE, PLACES | {"downsample_factor": 2}, tiles),
    "idefics3": Reader(LLAMA, SQUARE, PLACES | {"scale_factor": 2}, stacked_tiles),
    "llava_next": Reader(LLAMA, CLIP, PLACE | PINPOINTS, unpadded_tiles),
    "llava_onevision": Reader(
        TEXT | {"model_type": "qwen2"},
        SQUARE | {"model_type": "siglip_vision_model"},
        PLACE | PINPOINTS,
        unpadded_tiles,
    ),
    "ovis2": Reader(
        TEXT | {"model_type": "qwen2"},
        SQUARE | OVIS,
        PLACES | {"hidden_size": 32, "visual_indicator_token_ids": [9, 10, 11, 12, 13]},
        squares(1),
    ),
    "paligemma": Reader(
        TEXT | {"model_type": "gemma"},
        SQUARE | {"projection_dim": 32},
        PLACE | {"projection_dim": 32},
        squares(4),
    ),
    "smolvlm": Reader(LLAMA, SQUARE, PLACES | {"scale_factor": 2}, stacked_tiles),
}


def image_reader(name: str) -> Any:
    """A whole model in float32 with random weights that are large enough to see."""
    made = copy.deepcopy(READERS[name])  # configurations change what they are given
    config = AutoConfig.for_model(
        made.model_type or name,
        text_config=made.text | {"vocab_size": VOCABULARY},
        vision_config=made.vision,
        **made.options,
    )
    return whole_model(config)


def invented_images(name: str) -> list[ImageInput]:
    """Three images, of different sizes where the model reads different sizes."""
    generator = torch.Generator().manual_seed(3)
    return [READERS[name].image(number, generator) for number in range(3)]


def image_examples(images: Sequence[ImageInput]) -> list[Example]:
    """One image and two responses; two images and three responses; none; the first image twice more.

    The last ones begin like the first example, up to a token after the image, and up to another image.
    """
    random = np.random.default_rng(0)

    def ids(count: int) -> TokenIds:
        return random.integers(20, VOCABULARY, count).astype(np.int32)

    def example(prompt: Sequence[int | ImageInput], *responses: int) -> Example:
        used = tuple(part for part in prompt if isinstance(part, ImageInput))
        parts = [ids(p) if isinstance(p, int) else np.full(p.tokens, IMAGE_TOKEN, np.int32) for p in prompt]
        return Example(np.concatenate(parts), tuple(map(ids, responses)), images=used)

    first, second, third = images
    found = [
        example((5, first, 7), 9, 4),
        example((3, second, 2, third, 6), 11, 6, 1),
        example((12,), 5, 8),
        example((2, first, 3, first, 6), 7, 10),
    ]
    begin, *_ = found
    for image, same in ((first, 9), (second, 5)):
        alike = example((5, image, 8), 3, 5)
        alike.prompt_ids[:5] = begin.prompt_ids[:5]
        alike.prompt_ids[-8:][: same - 5] = begin.prompt_ids[-7:][: same - 5]
        found.append(alike)
    return found


def own_inputs(model: Any, ids: Tensor, images: Sequence[ImageInput]) -> dict[str, Tensor]:
    """What a processor returns for one prompt, beside ids."""
    inputs = {"attention_mask": torch.ones_like(ids)}
    for name in images[0].inputs if images else ():
        inputs[name] = batched([image.inputs[name] for image in images])
    has_positions = images and hasattr(model.model, "get_rope_index")
    if kind := "mm_token_type_ids" if has_positions else _KINDS.get(model.config.model_type):
        inputs[kind] = (ids == IMAGE_TOKEN).int()
    return inputs


def row_logps(model: Any, examples: Sequence[Example]) -> Tensor:
    """Log-probs of all targets by transformers itself: the whole model's forward, row by row."""
    found = []
    for example in examples:
        for response in example.responses:
            ids = torch.from_numpy(np.concatenate((example.prompt_ids, response)).astype(np.int64))[None]
            inputs = own_inputs(model, ids, example.images)
            logps = model(ids, **inputs, use_cache=False).logits[0].log_softmax(-1)
            start = len(example.prompt_ids)
            found.append(logps[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(found)


def batched(parts: Sequence[Tensor]) -> Tensor:
    """The images of one prompt, padded to the largest as by a processor."""
    sizes = [max(part.shape[dim] for part in parts) for dim in range(1, parts[0].dim())]
    joined = parts[0].new_zeros(sum(map(len, parts)), *sizes)
    start = 0
    for part in parts:
        joined[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return joined
