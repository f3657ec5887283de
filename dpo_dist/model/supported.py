"""Checks of a model's configuration before its weights are loaded, and notes on its training."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import AdapterConfig, ModelConfig
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.model.architectures import ARCHITECTURES, few_positions, recorded_arrangement
from dpo_dist.model.attention import heads_of_layers
from dpo_dist.model.layers import check_compiler, check_liger, checkpoint_layers
from dpo_dist.model.lora import check_adaptable, find_modules, target_layers
from dpo_dist.model.memory import check_offload
from dpo_dist.model.numerics import check_precision
from dpo_dist.model.sdpa import not_causal
from dpo_dist.model.ulysses import cannot_be_shared, check_heads

# Parts of the names of options that make training random (dropout, layerdrop, router_jitter_noise), or that
# divide weights in place for evaluation, which exports would write (rescale_every of RWKV).
_NOISES = ("drop", "jitter", "noise", "rescale_every")

# By `model_type`: routers that draw experts at random in training only, and the option that names a noise but
# is a threshold of the experts' weights in evaluation, too (SparseMixer of Phi-3.5-MoE, arXiv:2409.12136).
_SAMPLING_ROUTERS = {"phimoe": ("router", "router_jitter_noise")}

# By `model_type`: the option for the size of a table of positions, beyond which a forward fails.
_POSITION_TABLES = {
    "codegen": "max_position_embeddings",
    "ctrl": "max_position_embeddings",
    "gptj": "max_position_embeddings",
    "mpt": "max_seq_len",
}

# A value of `use_bidirectional_attention`, by which only tokens of images see later ones (Gemma 4).
_OF_IMAGES = "vision"


def check_supported(model_config: Any, max_length: int) -> None:
    """Check what the configuration of a model says about its log-probs; the check at start tries the model.

    Args:
        model_config: a transformers configuration.
        max_length: the longest prompt plus response, in tokens. The last token is not an input.

    Raises:
        ConfigError: the model is not causal, or is exact for shorter sequences only.
    """
    text = model_config.get_text_config()
    _check_causal(text)
    _check_positions(text, max_length)


def training_notes(model_config: Any, max_length: int) -> list[str]:
    """Return notes for the user on the training of a supported model, one line each.

    Args:
        model_config: a transformers configuration.
        max_length: the longest prompt plus response, in tokens.
    """
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    notes = []
    if positions is not None and max_length - 1 > positions:
        notes.append(
            f"warning: data.max_length={max_length:,} is more than the {positions:,} positions of the model "
            "(max_position_embeddings): its log-probs of longer sequences may mean little"
        )
    return notes


def check_text(model_config: Any, key: str = "model.path") -> None:
    """Check that the configuration of a model describes one model of text.

    Raises:
        ConfigError: it describes several, as of a model of sounds that reads text (MusicGen), or no layers.
    """
    try:
        text = model_config.get_text_config()
    except ValueError as error:
        raise ConfigError(
            "config.json describes several models of text",
            where=key,
            got=f"{model_config.model_type}: {first_line(error)}",
            expected="a causal language model",
            remedy="choose another model",
        ) from error
    if getattr(text, "num_hidden_layers", None) == 0:
        raise ConfigError(
            "config.json describes a model without layers",
            where=key,
            got=f"{model_config.model_type} with num_hidden_layers=0",
            expected="1 or more",
            remedy="download or save the model again",
        )


def check_causal_class(model_config: Any, key: str = "model.path") -> None:
    """Check that the model is one that transformers' AutoModelForCausalLM loads.

    Raises:
        ConfigError: there is no such class, as for a model of images and text that has no text model.
    """
    own = getattr(model_config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in own or type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    raise ConfigError(
        "transformers has no causal language model of this architecture",
        where=key,
        got=model_config.model_type,
        expected="an architecture that AutoModelForCausalLM loads",
        remedy="choose another model; of one that reads images, save its text model as a folder of its own",
    )


def _check_causal(model_config: Any) -> None:
    bidirectional = getattr(model_config, "use_bidirectional_attention", None)
    if bidirectional and bidirectional != _OF_IMAGES:
        option = f"use_bidirectional_attention={str(bidirectional).lower()}"
    elif not getattr(model_config, "is_causal", True):
        option = "is_causal=false"
    else:
        return
    raise not_causal(f"{model_config.model_type} with {option}")


def _check_positions(model_config: Any, max_length: int) -> None:
    option = _POSITION_TABLES.get(model_config.model_type)
    architecture = ARCHITECTURES.get(model_config.model_type)
    if architecture is not None and architecture.has_learned_positions:
        option = "max_position_embeddings"
    positions = max_length if option is None else getattr(model_config, option)
    if max_length - 1 > positions:
        raise few_positions(positions, max_length)


def is_noise(name: str, value: object, model_type: str) -> bool:
    """Return whether an option of a configuration makes training differ from evaluation."""
    _, threshold = _SAMPLING_ROUTERS.get(model_type, ("", ""))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and name != threshold and any(noise in name for noise in _NOISES)


def switch_off_noise(model_config: Any) -> None:
    """Set the options by which training differs from evaluation to 0, also in configurations of parts."""
    for name, value in vars(model_config).items():
        if is_noise(name, value, model_config.model_type):
            setattr(model_config, name, type(value)(0))
        elif isinstance(value, PreTrainedConfig):
            switch_off_noise(value)


def keep_evaluating(causal_lm: Any) -> None:
    """Keep routers that draw experts at random in training in evaluation mode, whatever that of the model."""
    router, _ = _SAMPLING_ROUTERS.get(causal_lm.config.get_text_config().model_type, ("", ""))
    for name, module in causal_lm.named_modules():
        if router and name.endswith(f".{router}"):
            module.eval()
            module.train = partial(_as_it_is, module)


def _as_it_is(module: nn.Module, _mode: bool = True) -> nn.Module:
    return module


def freeze_as_defined(causal_lm: Any) -> None:
    """Freeze the weights that an architecture does not train, such as the biases of ERNIE's routers.

    transformers makes every weight trainable that it reads, except under ZeRO-3.
    """
    with torch.device("meta"):
        defined = type(causal_lm)(causal_lm.config)
    for name, weight in defined.named_parameters():
        if not weight.requires_grad:
            causal_lm.get_parameter(name).requires_grad_(False)


def check_device(config: ModelConfig, model_type: str, device: torch.device) -> None:
    """Check that options of the model have an effect on `device`, and can run there.

    Raises:
        ConfigError: one has none, or cannot.
    """
    check_precision(config.dtype, device)
    if config.liger:
        check_liger(model_type, device)
    if config.compile:
        check_compiler(device)
    if config.activation_offload:
        check_offload(device)


def check_shared_tokens(model_config: Any, ranks: int) -> None:
    """Check that `ranks` ranks can share the tokens of a micro-batch, as far as config.json says.

    Raises:
        ConfigError: its heads cannot be divided, or its architecture cannot be packed.
    """
    text = model_config.get_text_config()
    for heads in heads_of_layers(text):
        check_heads(heads, ranks)
    if ranks > 1 and recorded_arrangement(text.model_type) is not Arrangement.packed:
        raise cannot_be_shared(text.model_type, ranks)


def check_modules(causal_lm: Any, config: ModelConfig, adapter: AdapterConfig | None) -> None:
    """Check that a model has the modules to which options apply.

    Args:
        causal_lm: without an adapter, of which no tensor is used; its layers may be set to be checkpointed.
        config: of the model.
        adapter: that is trained.

    Raises:
        ConfigError: it has no such modules.
    """
    checkpoint_layers(causal_lm, config.gradient_checkpointing)
    if adapter is not None:
        targets = target_layers(causal_lm, adapter)
        if not adapter.continues:
            check_adaptable(causal_lm, targets)
        find_modules(causal_lm, adapter.modules_to_save or [])
