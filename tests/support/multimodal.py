"""Small models that read images, in folders as users have them: all parts under one config.json."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from tests.support.families import COMMON, DELTA, EXPERTS, HEADS

# Without the ids that tokens of images have in these models.
TEXT = {name: value for name, value in COMMON.items() if not name.endswith("_id")} | HEADS
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {"image_size": 28, "patch_size": 14}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
QWEN |= {"num_position_embeddings": 16}
STACKED = QWEN | {"deepstack_visual_indexes": [0]}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
ROPE = {"rope_parameters": PLAIN_ROPE | {"mrope_section": [2, 1, 1]}}
PLACES = {"image_token_id": 5, "video_token_id": 6}
PLACE = {"image_token_index": 5}
SHARED_KEYS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
SHARED_KEYS |= {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "global_head_dim": 16}
ROUTED = {"num_local_experts": 2, "moe_layers": [1], "intermediate_size_mlp": 48}
LLAMA_VISION = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
# By model_type: options of its text part, of its vision tower and of itself.
_PARTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (TEXT | {"sliding_window": 8}, VISION | PIXELS, PLACE | {"mm_tokens_per_image": 4}),
    "gemma4": (
        TEXT | SHARED_KEYS,
        VISION | {"head_dim": 8, "patch_size": 14},
        PLACES | {"audio_config": None},
    ),
    "glm46v": (TEXT | ROPE, QWEN, PLACES),
    "internvl": (
        TEXT | {"model_type": "qwen3"},
        VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        PLACES,
    ),
    "lfm2_vl": (TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, VISION, PLACES),
    "llama4": (
        TEXT | ROUTED,
        VISION | PIXELS | LLAMA_VISION,
        PLACE | {"boi_token_index": 7, "eoi_token_index": 8},
    ),
    "llava": (TEXT | {"model_type": "llama"}, VISION | PIXELS | {"model_type": "clip_vision_model"}, PLACE),
    "mistral3": (TEXT | {"model_type": "mistral"}, VISION | PIXELS | {"model_type": "pixtral"}, PLACE),
    "mllama": (
        TEXT | {"cross_attention_layers": [1], "rope_parameters": PLAIN_ROPE, "pad_token_id": None},
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "attention_heads": 2}
        | {"num_global_layers": 1, "vision_output_dim": 32, "intermediate_layers_indices": [0]}
        | PIXELS
        | {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
        PLACE,
    ),
    "qwen2_5_vl": (TEXT | ROPE, QWEN | {"fullatt_block_indexes": [0]}, PLACES),
    "qwen3_5": (TEXT | DELTA, QWEN, PLACES),
    "qwen3_5_moe": (TEXT | DELTA | EXPERTS | {"shared_expert_intermediate_size": 16}, QWEN, PLACES),
    "qwen3_vl": (TEXT | ROPE, STACKED, PLACES),
    "qwen3_vl_moe": (TEXT | ROPE | EXPERTS, STACKED, PLACES),
}
IMAGE_MODELS = tuple(_PARTS)


def image_model(model_type: str, vocab_size: int, **of_text: Any) -> Any:
    """A whole model in float32 with random weights that are large enough to see."""
    text, vision, options = _PARTS[model_type]
    sizes = {"vocab_size": vocab_size, "vocab_size_per_layer_input": vocab_size} | of_text
    parts = {"text_config": text | sizes, "vision_config": vision}
    return whole_model(AutoConfig.for_model(model_type, **parts | options), std=0.1)


def whole_model(config: Any, seed: int = 1, std: float = 0.15) -> Any:
    """A whole model in float32 with random weights that are large enough to see."""
    torch.manual_seed(seed)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=std)
    return model


def write_multimodal(folder: Path, model_type: str, vocab_size: int, **of_text: Any) -> Path:
    """Write an `image_model`."""
    image_model(model_type, vocab_size, **of_text).save_pretrained(folder)
    return folder
