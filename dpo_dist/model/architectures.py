"""Architectures that tests cover, with facts about each; imports no torch, so that errors appear at once."""

from dataclasses import dataclass
from pathlib import Path

from dpo_dist.batching.plan import Arrangement
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.folder import CONFIG_FILE, read_model_json


@dataclass(frozen=True)
class Architecture:
    """Facts about an architecture whose packed forward is exact.

    Attributes:
        is_exact_with_liger: the packed forward is also exact with Liger's norms, rotary embedding and gated
            MLP (tests/gpu/test_layers_gpu.py).
        has_learned_positions: each position has a learned embedding, so the number of positions is limited.
    """

    is_exact_with_liger: bool = False
    has_learned_positions: bool = False


# By `model_type`. tests/unit/model/test_architectures.py shows that each packed one is exact. The check at
# start decides for the model at hand (model/exactness.py), also if its architecture is not here.
ARCHITECTURES = {
    "cohere": Architecture(),
    "cohere2": Architecture(),
    "deepseek_v3": Architecture(),
    "ernie4_5": Architecture(),
    "exaone4": Architecture(is_exact_with_liger=True),
    "gemma": Architecture(is_exact_with_liger=True),
    "gemma2": Architecture(),
    "gemma3_text": Architecture(is_exact_with_liger=True),
    "glm": Architecture(),
    "glm4": Architecture(is_exact_with_liger=True),
    "gpt2": Architecture(has_learned_positions=True),
    "gpt_neox": Architecture(),
    "gpt_oss": Architecture(),
    "granite": Architecture(is_exact_with_liger=True),
    "granitemoe": Architecture(),
    "hyperclovax": Architecture(),
    "llama": Architecture(is_exact_with_liger=True),
    "minicpm3": Architecture(),
    "ministral": Architecture(is_exact_with_liger=True),
    "ministral3": Architecture(),
    "mistral": Architecture(is_exact_with_liger=True),
    "mixtral": Architecture(),
    "olmo": Architecture(),
    "olmo2": Architecture(is_exact_with_liger=True),
    "olmo3": Architecture(is_exact_with_liger=True),
    "olmoe": Architecture(),
    "opt": Architecture(has_learned_positions=True),
    "phi": Architecture(),
    "phi3": Architecture(is_exact_with_liger=True),
    "phimoe": Architecture(),
    "qwen2": Architecture(is_exact_with_liger=True),
    "qwen2_moe": Architecture(),
    "qwen3": Architecture(is_exact_with_liger=True),
    "qwen3_moe": Architecture(),
    "seed_oss": Architecture(),
    "smollm3": Architecture(is_exact_with_liger=True),
    "starcoder2": Architecture(),
}


# Architectures that mix tokens outside of attention or do not call the registered attention. The check at
# start tries others packed first. tests/dist/test_families.py trains them.
IN_ROWS = frozenset(
    {
        "bamba",
        "bloom",
        "codegen",
        "falcon",
        "falcon_h1",
        "falcon_mamba",
        "gpt_neo",
        "gptj",
        "granitemoehybrid",
        "jamba",
        "mamba",
        "mamba2",
        "minimax",
        "mpt",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5_text",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "xglm",
        "xlstm",
    }
)


def recorded_arrangement(model_type: str) -> Arrangement:
    """Return the cheapest arrangement that may be exact for an architecture, `packed` if it is not known."""
    return Arrangement.padded if model_type in IN_ROWS else Arrangement.packed


def few_positions(positions: int, max_length: int, key: str = "model.path") -> ConfigError:
    """Return the error for a model whose positions are fewer than the inputs of a sequence.

    Args:
        positions: of the model.
        max_length: tokens of the longest sequence, of which the last is not an input.
        key: the configuration key of the model.
    """
    return ConfigError(
        "the model has fewer positions than a sequence of data.max_length needs",
        where=f"data.max_length, {key}",
        got=f"{max_length} with {positions} positions",
        expected=f"{positions + 1} or less; the last token of a sequence is not an input",
        remedy=f"set data.max_length to {positions + 1} or less",
    )


def check_described(folder: Path, key: str) -> None:
    """Check that config.json of a model folder names an architecture and no quantized weights.

    Args:
        folder: of the model.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: config.json names no architecture, or quantized weights.
    """
    content = read_model_json(folder / CONFIG_FILE)
    if "auto_map" in content:  # the model's own code may give it another type
        return
    model_type = content.get("model_type")
    if not model_type:
        raise ConfigError(
            "config.json of the model names no architecture",
            where=key,
            got=f"{folder / CONFIG_FILE} without model_type",
            remedy="download or save the model again",
        )
    quantized = content.get("quantization_config")
    if isinstance(quantized, dict):
        raise quantized_weights(folder, quantized, key)


def quantized_weights(folder: Path, quantized: dict[str, object], key: str) -> ConfigError:
    """Return the error for a model of which the weight files are quantized.

    Quantized weights have no gradient: biases and norms alone would be trained.
    """
    return ConfigError(
        "the weight files of the model are quantized",
        where=key,
        got=f"{folder}, quantized by {quantized.get('quant_method', 'a method without a name')}",
        expected="weights in bf16, fp16 or fp32",
        remedy="use the original model; model.quantization=nf4 quantizes it while it is loaded",
    )
