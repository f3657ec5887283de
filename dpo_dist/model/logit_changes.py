"""Factors and caps of logits by architecture, read from a model's configuration."""

from typing import Any

from dpo_dist.objective.token_logps import LogitChange

# Options of transformers' configurations. A division of the output layer's input counts as one of its logits.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Architectures that multiply by an option by which others divide.
_MULTIPLYING = {"hyperclovax"}


def logit_change(model_config: Any) -> LogitChange:
    """Return the change that a model makes to its logits before softmax.

    Args:
        model_config: a transformers configuration of a text model.
    """
    divides = model_config.model_type not in _MULTIPLYING
    scale = 1.0
    for name in _FACTORS:
        scale *= _option(model_config, name) or 1.0
    for name in _DIVISORS:
        value = _option(model_config, name) or 1.0
        scale = scale / value if divides else scale * value
    caps = [cap for name in _CAPS if (cap := _option(model_config, name))]
    return LogitChange(scale, min(caps, default=None))


def _option(model_config: Any, name: str) -> float | None:
    value = getattr(model_config, name, None)
    return float(value) if isinstance(value, int | float) else None
