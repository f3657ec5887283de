"""What is known about architectures, and checks of config.json."""

from typing import Any

from dpo_dist.batching.plan import Arrangement
from dpo_dist.foundation.errors import ConfigError

# Architectures, by `model_type`, that are exact with Liger's norms, rotary embedding and gated MLP, too
# (tests/gpu/test_layers_gpu.py).
_LIGER = """
exaone4 gemma gemma3_text glm4 granite llama ministral mistral olmo2 olmo3 phi3 qwen2 qwen3 smollm3
"""
EXACT_WITH_LIGER = frozenset(_LIGER.split())

# Architectures that mix tokens outside of attention or do not call the registered attention. The check at
# start tries others packed first. tests/dist/test_families.py trains them.
_IN_ROWS = """
bamba bloom codegen falcon falcon_h1 falcon_mamba gpt_neo gptj granitemoehybrid jamba mamba mamba2
minimax mpt nemotron_h olmo_hybrid qwen3_5_text qwen3_next recurrent_gemma rwkv xglm xlstm
"""
IN_ROWS = frozenset(_IN_ROWS.split())

# The option for the size of a table of positions, beyond which a forward fails.
_POSITION_TABLES = {
    "codegen": "max_position_embeddings",
    "ctrl": "max_position_embeddings",
    "gpt2": "max_position_embeddings",
    "gptj": "max_position_embeddings",
    "mpt": "max_seq_len",
    "opt": "max_position_embeddings",
}

# Parts of the names of options that make training random (dropout, layerdrop, router_jitter_noise), or that
# divide weights in place for evaluation, which exports would write (rescale_every of RWKV).
_NOISES = ("drop", "jitter", "noise", "rescale_every")

# Routers that draw experts at random in training only, and the option that names a noise but is a threshold
# of the experts' weights in evaluation, too (SparseMixer of Phi-3.5-MoE, arXiv:2409.12136).
SAMPLING_ROUTERS = {"phimoe": ("router", "router_jitter_noise")}


def recorded_arrangement(model_type: str) -> Arrangement:
    """Return the cheapest arrangement that may be exact for an architecture, `packed` if it is not known."""
    return Arrangement.padded if model_type in IN_ROWS else Arrangement.packed


def check_supported(model_config: Any, max_length: int) -> None:
    """Check what config.json says about log-probs of sequences; the check at start tries the model."""
    text = model_config.get_text_config()
    # Gemma 4 has a value by which only tokens of images see later ones.
    if getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise not_causal(f"{text.model_type} with use_bidirectional_attention")
    if not getattr(text, "is_causal", True):
        raise not_causal(f"{text.model_type} with is_causal=false")
    table = _POSITION_TABLES.get(text.model_type)
    if table is not None and max_length - 1 > (positions := getattr(text, table)):
        raise few_positions(positions, max_length)


def not_causal(got: str) -> ConfigError:
    """Return the error for a model whose tokens attend to later tokens."""
    return ConfigError(
        "this model is not causal: its tokens attend to later tokens",
        where="model.path",
        got=got,
        remedy="choose a causal language model",
    )


def few_positions(positions: int, max_length: int, key: str = "model.path") -> ConfigError:
    """Return the error for a model whose positions are fewer than the inputs of a sequence."""
    return ConfigError(
        "the model has fewer positions than a sequence of data.max_length needs",
        where=f"data.max_length, {key}",
        got=f"{max_length} with {positions} positions",
        expected=f"{positions + 1} or less; the last token of a sequence is not an input",
        remedy=f"set data.max_length to {positions + 1} or less",
    )


def training_notes(model_config: Any, max_length: int) -> list[str]:
    """Return notes for the user on the training of a supported model, one line each."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is None or max_length - 1 <= positions:
        return []
    return [
        f"warning: data.max_length={max_length:,} is more than the {positions:,} positions of the model "
        "(max_position_embeddings): its log-probs of longer sequences may mean little"
    ]


def is_noise(name: str, value: object, model_type: str) -> bool:
    """Return whether an option of a configuration makes training differ from evaluation."""
    _, threshold = SAMPLING_ROUTERS.get(model_type, ("", ""))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and name != threshold and any(noise in name for noise in _NOISES)


def switch_off_noise(model_config: Any) -> None:
    """Set the options by which training differs from evaluation to 0, also in configurations of parts."""
    for name, value in vars(model_config).items():
        if is_noise(name, value, model_config.model_type):
            setattr(model_config, name, type(value)(0))
        elif hasattr(value, "model_type"):
            switch_off_noise(value)
