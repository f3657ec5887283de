"""Architectures for which the packed forward is exact; imports no torch, so that errors appear at once."""

from dataclasses import dataclass
from pathlib import Path

from dpo_dist.errors import ConfigError
from dpo_dist.model.folder import CONFIG_FILE, read_model_json


@dataclass(frozen=True)
class Architecture:
    """Facts about an architecture for which the packed forward is exact.

    Attributes:
        is_exact_with_liger: also with Liger's norms, rotary embedding and gated MLP
            (tests/gpu/test_layers_gpu.py).
        has_learned_positions: each position has a learned embedding, so the number of positions is limited.
    """

    is_exact_with_liger: bool = False
    has_learned_positions: bool = False


# By `model_type`. tests/unit/model/test_architectures.py shows each to be exact. Other architectures may mix
# tokens outside of attention (Mamba, Qwen3-Next), never call the registered attention (Bloom), or compute
# more after the output layer: their log-probs would be wrong without any error.
ARCHITECTURES = {
    "ernie4_5": Architecture(),
    "exaone4": Architecture(is_exact_with_liger=True),
    "gemma": Architecture(is_exact_with_liger=True),
    "gemma3_text": Architecture(is_exact_with_liger=True),
    "glm": Architecture(),
    "glm4": Architecture(is_exact_with_liger=True),
    "gpt2": Architecture(has_learned_positions=True),
    "gpt_neox": Architecture(),
    "granite": Architecture(is_exact_with_liger=True),
    "llama": Architecture(is_exact_with_liger=True),
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
    "qwen2": Architecture(is_exact_with_liger=True),
    "qwen2_moe": Architecture(),
    "qwen3": Architecture(is_exact_with_liger=True),
    "qwen3_moe": Architecture(),
    "seed_oss": Architecture(),
    "smollm3": Architecture(is_exact_with_liger=True),
    "starcoder2": Architecture(),
}


def unknown_architecture(model_type: str, key: str) -> ConfigError:
    """Return the error for an architecture that is not one of `ARCHITECTURES`."""
    return ConfigError(
        "the packed forward is not known to be exact for this architecture",
        where=key,
        got=model_type,
        expected=", ".join(sorted(ARCHITECTURES)),
        remedy="choose a model of one of these; to add an architecture, add it to ARCHITECTURES in "
        "dpo_dist/model/architectures.py and run tests/unit/model/test_architectures.py",
    )


def check_described(folder: Path, key: str) -> None:
    """Check that config.json of a model folder names a known architecture and no quantized weights.

    Args:
        folder: of the model.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: config.json names none or another one than `ARCHITECTURES`, or quantized weights.
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
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise unknown_architecture(str(model_type), key)
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
