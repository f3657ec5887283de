"""The losses that a mixture of experts defines for its routers."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from dpo_dist.config.losses import OF_MODEL, RouterConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.router import AUX_LOSS, RouterLoss, routing_sums, selections

_FUNCTION = "load_balancing_loss_func"


def own_coefficient(model_config: Any) -> float | None:
    """Return the coefficient of the load-balancing loss by config.json, 0 without; None: no such loss.

    The loss is that of `objective.router`: on invented logits, the function of the model's module and this
    package's formula give the same number.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if model_class is None or _FUNCTION not in vars(sys.modules[model_class.__module__]):
        return None
    try:
        with torch.device("meta"):
            facts = vars(model_class(model_config))
    except Exception:  # a constructor can raise anything; `without_weights` names the fault
        return None
    experts, top_k = facts.get("num_experts"), facts.get("num_experts_per_tok")
    if not experts or not top_k or not _is_same_loss(model_class, experts, top_k):
        return None
    return facts.get("router_aux_loss_coef", facts.get("aux_loss_coef")) or 0.0


def _is_same_loss(model_class: type, experts: int, top_k: int) -> bool:
    rows = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, rows.numel(), experts, generator=generator).unbind()
    try:
        expected = vars(sys.modules[model_class.__module__])[_FUNCTION](logits, experts, top_k, rows)
    except Exception:  # a function of other arguments
        return False
    sums = routing_sums(logits, rows.flatten(), top_k)
    ours = RouterLoss(1.0, None).parts(sums, selections(sums), int(rows.sum()))[AUX_LOSS]
    return isinstance(expected, Tensor) and torch.allclose(ours, expected, rtol=1e-4)


def router_loss(config: RouterConfig | None, model_config: Any) -> RouterLoss | None:
    """Return the losses of the routers that training adds; None if `config` is None or asks for none."""
    if config is None or not config.is_set:
        return None
    coefficient = own_coefficient(model_config)
    if coefficient is None:
        raise ConfigError(
            "this model defines no load-balancing loss of routers",
            where="loss.router",
            got=model_config.model_type,
            expected="a mixture of experts for which transformers defines one, such as mixtral or qwen3_moe",
            remedy="remove loss.router",
        )
    if config.aux_coefficient != OF_MODEL:
        given = None if config.aux_coefficient is None else float(config.aux_coefficient)
        return RouterLoss(given, config.z_coefficient)
    if not coefficient:
        raise ConfigError(
            "the model's config.json has no coefficient of the load-balancing loss",
            where="loss.router.aux_coefficient",
            got=f"{OF_MODEL} for {model_config.model_type}",
            remedy="set loss.router.aux_coefficient to a number, such as 0.001",
        )
    return RouterLoss(coefficient, config.z_coefficient)


def router_notes(config: RouterConfig | None, model_config: Any) -> list[str]:
    """Return a line on the losses of the routers of a model that is trained; none without routers."""
    if config is None or (coefficient := own_coefficient(model_config)) is None:
        return []
    if (added := router_loss(config, model_config)) is None:
        own = f" (its own coefficient is {coefficient:g})" if coefficient else ""
        return [
            "mixture of experts: trained without the router's load-balancing loss; "
            f"loss.router.aux_coefficient={OF_MODEL} adds it{own}"
        ]
    terms = {"load-balancing loss": added.aux, "z-loss": added.z}
    parts = [f"{value:g} times the router's {name}" for name, value in terms.items() if value is not None]
    return [f"mixture of experts: the loss of a step has {' and '.join(parts)}"]
