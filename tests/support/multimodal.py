"""Small models that read images, in folders as users have them: all parts under one config.json."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    Gemma3ForConditionalGeneration,
    Mistral3ForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
)

from tests.support.families import COMMON, DELTA, HEADS

# Without the ids that tokens of images have in these models.
TEXT = {name: value for name, value in COMMON.items() if not name.endswith("_id")} | HEADS
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {"image_size": 28, "patch_size": 14}
# By model_type: the class of the whole model, options of its parts and of itself.
_PARTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        Gemma3ForConditionalGeneration,
        TEXT | {"sliding_window": 8},
        VISION | PIXELS,
        {"mm_tokens_per_image": 4, "image_token_index": 5},
    ),
    "qwen3_5": (
        Qwen3_5ForConditionalGeneration,
        TEXT | DELTA,
        {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
        | {"num_position_embeddings": 16},
        {"image_token_id": 5, "video_token_id": 6},
    ),
    "mistral3": (
        Mistral3ForConditionalGeneration,
        TEXT | {"model_type": "mistral"},
        VISION | PIXELS | {"model_type": "pixtral"},
        {"image_token_index": 5},
    ),
}


def write_multimodal(folder: Path, model_type: str, vocab_size: int) -> Path:
    """Write a whole model in float32 with random weights that are large enough to see."""
    whole_class, text, vision, own = _PARTS[model_type]
    parts = {"text_config": text | {"vocab_size": vocab_size}, "vision_config": vision}
    config = AutoConfig.for_model(model_type, **parts, **own)
    torch.manual_seed(1)
    model = whole_class(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder
