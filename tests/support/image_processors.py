"""Model folders with real image processors of small sizes and toy tokenizers; image files; records."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerFast

from dpo_dist.data.images import ImageProcessor
from dpo_dist.data.records import IMAGE, ImageFile, Message, Origin, PreferenceRecord
from tests.support.tiny import _byte_level

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
_INTERNVL = {"start_image_token": "<img>", "end_image_token": "</img>"}
_INTERNVL |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
_PATCHES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12},
}
_SQUARE = {"size": {"height": 28, "width": 28}}
_GLM = _PATCHES | {"image_processor_type": "Glm46VImageProcessor"}
_QWEN = ("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>", _PATCHES, {}, {})
# By model_type: what the template writes for an image, the token of its features, parameters of the image
# processor and of the processor, and named tokens.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "gemma3": (
        "<start_of_image>",
        "<image_soft_token>",
        {"image_processor_type": "Gemma3ImageProcessor"} | _SQUARE,
        {"image_seq_length": 4},
        _GEMMA,
    ),
    "mistral3": (
        "[IMG]",
        "[IMG]",
        {"image_processor_type": "PixtralImageProcessorFast", "patch_size": 14, "size": {"longest_edge": 84}},
        {"patch_size": 14, "spatial_merge_size": 2},
        {},
    ),
    "llava": (
        "<image>\n",
        "<image>",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
        },
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {},
    ),
    "internvl": (
        "<IMG_CONTEXT>\n",
        "<IMG_CONTEXT>",
        {"image_processor_type": "GotOcr2ImageProcessorFast"} | _SQUARE,
        {"image_seq_length": 2},
        _INTERNVL,
    ),
    "glm46v": ("<|begin_of_image|><|image|><|end_of_image|>", "<|image|>", _GLM, {}, {}),
    "gemma4": (
        "<|image|>",
        "<|image|>",
        {
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 14,
            "max_soft_tokens": 70,
            "pooling_kernel_size": 3,
        },
        {},
        {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
        | {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
    ),
}
IMAGE_PROCESSORS = tuple(_FAMILIES)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
_SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<start_of_image>", "<image_soft_token>", "<end_of_image>"]
_SPECIAL += ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<image>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
_SPECIAL += ["<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>", "<|image>", "<image|>"]
_SPECIAL += ["<|audio|>", "<|audio>", "<audio|>"]


@cache
def image_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A toy tokenizer whose template writes images as those of the family do."""
    place, _, _, _, named = _FAMILIES[kind]
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(_SPECIAL),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE.replace("PLACE", place),
        extra_special_tokens=named or ["<|im_start|>"],
    )


def write_processor(folder: Path, kind: str, **parameters: Any) -> Path:
    """Write the configurations of a model and its image processor, which has other `parameters`."""
    _, token, own, whole, _ = _FAMILIES[kind]
    config = AutoConfig.for_model(kind)
    config.image_token_id = image_tokenizer(kind).convert_tokens_to_ids(token)
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(own | parameters))
    (folder / "processor_config.json").write_text(json.dumps(whole))
    return folder


def processor_of(folder: Path, kind: str, max_pixels: int | None = None, **parameters: Any) -> ImageProcessor:
    """The processor of a new folder."""
    write_processor(folder, kind, **parameters)
    return ImageProcessor(folder, image_tokenizer(kind), max_pixels)


def picture(seed: int, width: int = 60, height: int = 45) -> Image.Image:
    """An invented picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The file of a picture."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def image_record(*contents: str, images: list[bytes], responses: tuple[str, ...] = ("Yes.", "No.")) -> Any:
    """A record; each `#` in the contents of its turns is an image."""
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role, text.replace("#", IMAGE)) for role, text in zip(roles, contents, strict=False)]
    return PreferenceRecord(
        tuple(turns), responses, Origin("records", 1), images=tuple(map(ImageFile, images))
    )
