"""Which architectures the packed forward gives the exact log-probs of."""

from typing import Any

from dpo_dist.errors import ConfigError
from dpo_dist.model.attention import sliding_window_error

# What the tests hold to be exact. Others may mix tokens outside of attention (Mamba, Qwen3-Next), never call
# the registered attention (Bloom), or go on after the output layer: their numbers would be silently wrong.
EXACT_MODEL_TYPES = frozenset(
    {
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)

_LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


def refuse_unpackable(model_config: Any, max_length: int) -> None:
    """Raise for an architecture whose log-probs the packed forward would not give exactly.

    Raises:
        ConfigError: logits are changed after the output layer, attention is windowed below `max_length`, or
            the architecture is not one of `EXACT_MODEL_TYPES`.
    """
    for name, neutral in _LOGIT_CHANGES.items():
        value = getattr(model_config, name, neutral)
        if value not in (None, neutral):
            raise ConfigError(
                "this architecture changes its logits after the output layer, where the log-prob head ends",
                where="model.path",
                got=f"{model_config.model_type} with {name}={value}",
                remedy="choose another model; Qwen2/2.5/3, Llama, Mistral, Gemma and Phi work",
            )
    if model_config.model_type not in EXACT_MODEL_TYPES:
        raise ConfigError(
            "the packed forward is not known to give this architecture's log-probs",
            where="model.path",
            got=model_config.model_type,
            expected=", ".join(sorted(EXACT_MODEL_TYPES)),
            remedy="choose another model",
        )
    window = getattr(model_config, "sliding_window", None)
    layer_types = getattr(model_config, "layer_types", None) or ["sliding_attention"]
    uses_window = getattr(model_config, "use_sliding_window", True) and "sliding_attention" in layer_types
    if window is not None and uses_window and window < max_length:
        raise sliding_window_error(window, max_length)
