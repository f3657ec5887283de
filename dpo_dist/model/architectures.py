"""Facts about model architectures: checks of config.json, exact kernels, and the router's losses."""

import inspect
import sys
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
)

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.losses import MODEL_COEFFICIENT, RouterConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.router import RouterLoss

# Text models (`model_type`) for which Liger's norms, rotary embedding and gated MLP are exact
# (tests/gpu/test_layers_gpu.py), with the activation that Liger computes even if config.json names another.
_SWIGLU = """
deepseek_v3 exaone4 glm4 gpt_oss granite llama llama4_text ministral mistral mixtral olmo2 olmo3 phi3 qwen2
qwen3 qwen3_5_text qwen3_moe smollm3
"""
_GEGLU = "gemma gemma2 gemma3_text"
EXACT_WITH_LIGER = dict.fromkeys(_SWIGLU.split(), "silu") | dict.fromkeys(_GEGLU.split(), "gelu_pytorch_tanh")

# Architectures that mix tokens outside of attention, do not call the registered attention function, or choose
# or weigh keys by their places in the sequence: packing would give wrong log-probs. The check at start tries
# all other architectures packed first. tests/unit/model/test_architectures.py has a model of each.
_UNPACKABLE = """
bloom codegen falcon falcon_mamba glm5_next_text gpt_neo gptj inkling2_text inkling_text jamba mamba minimax
mpt qwen4_exp_text recurrent_gemma rwkv xglm xlstm zamba
"""
UNPACKABLE = frozenset(_UNPACKABLE.split())

# Architectures with layers that read a row's tokens in order. They can be packed, as each branch starts in
# the state of its prefix (model/states.py), but ranks cannot share the tokens of a row.
_WITH_STATES = """
bailing_hybrid bamba falcon_h1 granitemoehybrid kimi_linear lfm2 lfm2_moe lfm3 mamba2 nemotron_h olmo_hybrid
qwen3_5_moe_text qwen3_5_text qwen3_next zamba2
"""
WITH_STATES = frozenset(_WITH_STATES.split())

# Tables of learned positions may have a few rows more than positions, as in OPT.
_SPARE_POSITIONS = 8

# Parts of the names of options that make training random (dropout, layerdrop, router_jitter_noise), and
# RWKV's rescale_every, which divides weights in place in evaluation: an export would write the divided
# weights.
NOISES = ("drop", "jitter", "noise", "rescale_every")

# Routers that draw experts at random in training, by `model_type`: the router's module, and an option that is
# named noise but is a threshold for the experts' weights (SparseMixer of Phi-3.5-MoE, arXiv:2409.12136).
SAMPLING_ROUTERS = {"phimoe": ("router", "router_jitter_noise")}

_FIXED_POSITIONS = frozenset({"codegen", "ctrl", "gptj", "mpt"})
"""Architectures with positions in a table that is not an embedding; sequences longer than the table fail."""


SCORE = "score"
"""The name of a reward model's output layer in transformers' classes of causal models."""
_REWARD_MODEL = "ForSequenceClassification"


def is_reward_model(architectures: Iterable[str] | None) -> bool:
    """Return whether the classes that a config.json names return scores."""
    return any(name.endswith(_REWARD_MODEL) for name in architectures or ())


def describe_reward_model(model_config: Any, key: str) -> None:
    """Make a model's configuration that of its class of reward models, with one score."""
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model_config), None)
    if kind is None:
        raise ConfigError(
            "transformers has no class of reward models for this architecture",
            where=key,
            got=model_config.model_type,
            expected=f"an architecture with a class ...{_REWARD_MODEL}, such as llama, qwen3 or gemma3_text",
            remedy="choose a model of such an architecture",
        )
    if not is_reward_model(model_config.architectures):
        model_config.num_labels = 1
    elif model_config.num_labels != 1:
        raise ConfigError(
            "the model classifies, and is no reward model",
            where=key,
            got=f"{model_config.num_labels} outputs",
            expected="one output",
            remedy="choose a reward model, or a causal language model, which gets a new output layer",
        )
    model_config.architectures = [kind.__name__]


def auto_class(model_config: Any, trust_remote_code: bool) -> Any:
    """Return the transformers auto class that loads the model class named in config.json.

    A model that also reads images must not load as its text class, which renames weights and drops parts.
    """
    if is_reward_model(model_config.architectures):
        return AutoModelForSequenceClassification
    kind = type(model_config)
    text = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(kind, None)
    names_text = text not in (None, multimodal) and text.__name__ in (model_config.architectures or ())
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or ())
    if multimodal is None or names_text or remote or not kind.__module__.startswith("transformers."):
        return AutoModelForCausalLM
    reads_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if reads_images else AutoModelForMultimodalLM


def recorded_arrangement(model_type: str) -> Arrangement:
    """Return the cheapest arrangement that may be exact for an architecture, `packed` for an unknown one."""
    return Arrangement.padded if model_type in UNPACKABLE else Arrangement.packed


class ImageMask(StrEnum):
    """In which layers the tokens of an image see later tokens of that image."""

    causal = "causal"  # in none
    in_windows = "in windows"  # in those with a sliding window
    whole = "whole"  # in all


def image_mask(model_config: Any) -> ImageMask:
    """Return how the tokens of an image attend to each other, in layers of a model with this config.json."""
    if model_config.model_type == "gemma3":
        return ImageMask.whole
    text = model_config.get_text_config()
    sees = getattr(text, "use_bidirectional_attention", None) == "vision"
    return ImageMask.in_windows if sees else ImageMask.causal


def check_causal(model_config: Any, key: str = "model.path") -> None:
    """Check that config.json describes a causal model; the check at start tries the model itself."""
    text = model_config.get_text_config()
    # With "vision" (Gemma 4), only image tokens attend to later tokens.
    is_one_way = getattr(text, "use_bidirectional_attention", None) in (None, False, "vision")
    if not (is_one_way and getattr(text, "is_causal", True)):
        raise ConfigError(
            "this model is not causal: by its config.json, tokens attend to later tokens",
            where=key,
            got=text.model_type,
            remedy="choose a causal language model",
        )


def context_length(model_config: Any) -> int | None:
    """Return the tokens of the longest sequence that a model was made for; None: not known."""
    text = model_config.get_text_config()
    positions = getattr(text, "max_seq_len" if text.model_type == "mpt" else "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def check_positions(causal_lm: Any, max_length: int, key: str = "model.path") -> None:
    """Check that a model's table of positions is long enough for `max_length`.

    That counts one more position behind a text if the model is a reward model.
    """
    text = causal_lm.config.get_text_config()
    positions = context_length(causal_lm.config)
    if positions is None or max_length - 1 <= positions:
        return
    tokens = set(causal_lm.get_input_embeddings().modules())  # with an adapter: the original and its copy
    others = (module for module in causal_lm.modules() if module not in tokens)
    tables = [module for module in others if isinstance(module, nn.Embedding)]
    has_table = any(positions <= table.num_embeddings <= positions + _SPARE_POSITIONS for table in tables)
    if has_table or text.model_type in _FIXED_POSITIONS:
        behind = int(is_reward_model([type(causal_lm).__name__]))
        most = positions + 1 - behind
        raise ConfigError(
            "the model has too few positions for data.max_length (or data.max_scorer_length)",
            where=f"data.max_length, {key}",
            got=f"{max_length - behind}, and the model has {positions} positions",
            expected=f"{most} or less" + ("" if behind else "; the last token of a sequence is not an input"),
            remedy=f"set data.max_length to {most} or less",
        )


def length_warnings(model_config: Any, max_length: int) -> list[str]:
    """Return a warning if `max_length` exceeds the model's positions."""
    positions = context_length(model_config)
    if positions is None or max_length - 1 <= positions:
        return []
    return [
        f"data.max_length={max_length:,} is more than the model's {positions:,} positions "
        "(max_position_embeddings): log-probs of longer sequences may be meaningless"
    ]


def is_noise(name: str, value: object, model_type: str) -> bool:
    """Return whether an option of a configuration makes training differ from evaluation."""
    _, threshold = SAMPLING_ROUTERS.get(model_type, ("", ""))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and name != threshold and any(noise in name for noise in NOISES)


def switch_off_noise(model_config: Any) -> None:
    """Set options by which training differs from evaluation to 0, also in the model's parts."""
    for name, value in vars(model_config).items():
        if is_noise(name, value, model_config.model_type):
            setattr(model_config, name, type(value)(0))
        elif hasattr(value, "model_type"):
            switch_off_noise(value)


# Parameters of `load_balancing_loss_func` where that function computes the formula of `objective.router`. In
# Doge it computes another formula and has other parameters.
_LOSS_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def own_coefficient(causal_lm: Any) -> float | None:
    """Return config.json's coefficient of the load-balancing loss, by default 0; None without such a loss."""
    function = getattr(sys.modules[type(causal_lm).__module__], "load_balancing_loss_func", None)
    text = causal_lm.config.get_text_config()
    facts = vars(causal_lm)
    # A model of several parts, and a reward model, have these options in the text config only.
    if text is not causal_lm.config or is_reward_model([type(causal_lm).__name__]):
        names = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
        facts = {name: getattr(text, name, None) for name in names}
    is_known = function is not None and list(inspect.signature(function).parameters) == _LOSS_PARAMETERS
    if not is_known or not facts.get("num_experts") or not facts.get("num_experts_per_tok"):
        return None
    return facts.get("router_aux_loss_coef", facts.get("aux_loss_coef")) or 0.0


def router_loss(config: RouterConfig | None, causal_lm: Any) -> RouterLoss | None:
    """Return the router losses that training adds; None if `config` asks for none."""
    if config is None or config.aux_coefficient is None:
        return None
    coefficient = own_coefficient(causal_lm)
    if coefficient is None:
        raise ConfigError(
            "transformers has no load-balancing loss for this model",
            where="loss.router",
            got=causal_lm.config.model_type,
            expected="a mixture of experts for which transformers defines one, such as mixtral or qwen3_moe",
            remedy="set loss.router.aux_coefficient=null",
        )
    if config.aux_coefficient != MODEL_COEFFICIENT:
        return RouterLoss(float(config.aux_coefficient))
    if not coefficient:
        raise ConfigError(
            "the model's config.json has no coefficient for the load-balancing loss",
            where="loss.router.aux_coefficient",
            got=f"{MODEL_COEFFICIENT} for {causal_lm.config.model_type}",
            remedy="set loss.router.aux_coefficient to a number, such as 0.001",
        )
    return RouterLoss(coefficient)


def router_notes(config: RouterConfig | None, causal_lm: Any) -> list[str]:
    """Return a note on router losses in training; no note for a model without routers."""
    if config is None:
        return []
    coefficient = own_coefficient(causal_lm)
    if coefficient is None:
        return []
    added = router_loss(config, causal_lm)
    if added is None:
        hint = f" (its own coefficient is {coefficient:g})" if coefficient else ""
        return [
            "mixture of experts: trained without the router's load-balancing loss; "
            f"loss.router.aux_coefficient={MODEL_COEFFICIENT} adds it{hint}"
        ]
    return [
        f"mixture of experts: the loss of a step has {added.aux:g} times the router's load-balancing loss"
    ]
