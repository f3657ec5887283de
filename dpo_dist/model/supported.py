"""Architectures for which the packed forward is exact, and checks of a model's configuration."""

from pathlib import Path
from typing import Any

from dpo_dist.errors import ConfigError
from dpo_dist.model.architectures import ARCHITECTURES, unknown_architecture
from dpo_dist.model.mask_rules import not_causal


def check_supported(model_config: Any, max_length: int) -> None:
    """Check that the packed forward computes the exact log-probs of a model.

    Args:
        model_config: a transformers configuration.
        max_length: the longest prompt plus response, in tokens. The last token is not an input.

    Raises:
        ConfigError: the architecture is not one of `ARCHITECTURES`, is not causal, or is exact for shorter
            sequences only.
    """
    if model_config.model_type not in ARCHITECTURES:
        raise unknown_architecture(model_config.model_type, "model.path")
    _check_causal(model_config)
    _check_positions(model_config, max_length)


def training_notes(model_config: Any, max_length: int) -> list[str]:
    """Return notes for the user on the training of a supported model, one line each.

    Args:
        model_config: a transformers configuration.
        max_length: the longest prompt plus response, in tokens.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    notes = []
    if positions is not None and max_length - 1 > positions:
        notes.append(
            f"warning: data.max_length={max_length:,} is more than the {positions:,} positions of the model "
            "(max_position_embeddings): its log-probs of longer sequences may mean little"
        )
    return notes


def _check_causal(model_config: Any) -> None:
    if getattr(model_config, "use_bidirectional_attention", None):
        option = "use_bidirectional_attention=true"
    elif not getattr(model_config, "is_causal", True):
        option = "is_causal=false"
    else:
        return
    raise not_causal(f"{model_config.model_type} with {option}")


def _check_positions(model_config: Any, max_length: int) -> None:
    if not ARCHITECTURES[model_config.model_type].has_learned_positions:
        return
    positions = model_config.max_position_embeddings
    if max_length - 1 > positions:
        raise ConfigError(
            "the model has fewer learned positions than a sequence of data.max_length needs",
            where="data.max_length",
            got=f"{max_length} with {positions} positions",
            expected=f"{positions + 1} or less; the last token of a sequence is not an input",
            remedy=f"set data.max_length to {positions + 1} or less",
        )


def check_no_remote_model(folder: Path, model_config: Any) -> None:
    """Check that a model uses code of transformers, for which the packed forward was tested.

    Args:
        folder: of the model, for the error.
        model_config: loaded by transformers with remote code allowed.

    Raises:
        ConfigError: the model's folder has its own class of model or configuration.
    """
    remote = (getattr(model_config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    config_module = type(model_config).__module__
    if remote is None and not config_module.startswith("transformers."):
        remote = f"{config_module}.{type(model_config).__name__}"
    if remote is not None:
        raise ConfigError(
            "the model has its own code, and the packed forward is not known to be exact for it",
            where="model.trust_remote_code",
            got=f"true for {folder}, whose config.json names {remote}",
            expected="an architecture of transformers",
            remedy="set model.trust_remote_code=false: transformers' own code for this model_type is used",
        )
