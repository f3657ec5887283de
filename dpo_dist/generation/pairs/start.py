"""Checks of `pairs` before torch is imported and processes join."""

import os
from pathlib import Path
from typing import Any

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.keys import as_written
from dpo_dist.config.schema import NO_MODEL, Resume, RunConfig
from dpo_dist.config.user_code import user_function
from dpo_dist.config.verb_options import (
    EndpointConfig,
    PairsConfig,
    PairsMethod,
)
from dpo_dist.config.verbs import check_needs
from dpo_dist.data.sources import check_source
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.folder import check_adapter, is_adapter, local_model_folder

_ALONE = (PairsMethod.scores, PairsMethod.people)
_FROM_MODELS = (PairsMethod.samples, PairsMethod.delta)
_OF_MODELS = (
    *("models", "max_new_tokens", "temperature", "top_p", "top_k", "unfinished"),
    *("prompt_parts", "prompt_part"),
)
_OF_JUDGES = ("samples", "reward_model", "function", "endpoint")


def check_pairs(config: RunConfig) -> None:
    """Check everything that needs no torch, network or other processes.

    Raises:
        ConfigError: keys of `pairs` contradict each other or have no effect, or a folder cannot be written.
        DataError: a local source is missing.
    """
    check_needs(config, "pairs")
    pairs = config.pairs
    if pairs.prompt_part >= pairs.prompt_parts:
        raise ConfigError(
            "there is no such part of the prompts",
            where="pairs.prompt_part",
            got=str(pairs.prompt_part),
            expected=f"0 to {pairs.prompt_parts - 1}, as pairs.prompt_parts={pairs.prompt_parts}",
            remedy="correct one of them",
        )
    _check_effects(config)
    if pairs.method in _FROM_MODELS:
        _check_models(config)
    if pairs.method is PairsMethod.samples:
        check_judge(pairs)
    for source in config.data.train:
        check_source(source)
        if source.weight != SourceConfig.weight:
            raise ConfigError(
                "the weight of a source has no effect on pairs",
                where=f"data.train, weight of {source.path}",
                got=as_written(source.weight),
                remedy="remove it, and set it in the training that reads the pairs",
            )


def needs_this_process(config: RunConfig) -> bool:
    """Return whether this process has work: methods without a model run on rank 0 alone."""
    return config.pairs.method not in _ALONE or os.environ.get("RANK", "0") == "0"


def responding_models(config: RunConfig) -> list[str]:
    """Return the models that respond, as configured."""
    return list(config.pairs.models) or [config.model.path]


def _check_effects(config: RunConfig) -> None:
    """Refuse keys that have no effect."""
    pairs, method = config.pairs, config.pairs.method
    with_method = f"with pairs.method={method}"
    for names, is_used, why in (
        (_OF_MODELS, method in _FROM_MODELS, with_method),
        (_OF_JUDGES, method is PairsMethod.samples, with_method),
        (("select", "margin"), method in (PairsMethod.samples, PairsMethod.scores), with_method),
        (("top_p", "top_k"), pairs.temperature > 0, "with pairs.temperature=0"),
        (("launcher", "reference"), bool(pairs.rounds), "without pairs.rounds"),
    ):
        for name in () if is_used else names:
            check_used(f"pairs.{name}", getattr(pairs, name), getattr(PairsConfig(), name), why)
    check_used("run.resume", config.run.resume, Resume.auto, "on pairs: finished parts are always used again")
    if method is PairsMethod.samples and pairs.temperature == 0 and pairs.samples > 1:
        raise ConfigError(
            "without a temperature every sample of a model is the same",
            where="pairs.temperature, pairs.samples",
            got=f"0, {pairs.samples}",
            remedy="raise pairs.temperature, or set pairs.samples=1",
        )


def check_used(key: str, value: Any, default: Any, why: str) -> None:
    """Refuse a value of a key that has no effect."""
    if value != default:
        raise ConfigError(
            f"{key} has no effect {why}", where=key, got=as_written(value), remedy=f"remove {key}"
        )


def _check_models(config: RunConfig) -> None:
    pairs, models = config.pairs, responding_models(config)
    if NO_MODEL in models:
        raise ConfigError(
            "no model responds to the prompts",
            where="pairs.models",
            got="null",
            remedy="set pairs.models=[MODEL], or model.path",
        )
    if config.model.path not in models:
        check_used("model.revision", config.model.revision, None, "if model.path is none of pairs.models")
    different = {Path(name).expanduser().resolve() for name in models}
    if pairs.method is PairsMethod.delta and not len(models) == len(different) == 2:
        raise ConfigError(
            "delta pairs need two models",
            where="pairs.models",
            got=as_written(models),
            expected="two different models: the stronger one, then the weaker one",
            remedy="set pairs.models=[STRONGER,WEAKER]",
        )
    if pairs.method is PairsMethod.samples and len(models) * pairs.samples < 2:
        raise ConfigError(
            "a pair needs two responses",
            where="pairs.samples",
            got=f"{pairs.samples} of one model",
            remedy="raise pairs.samples, or name two pairs.models",
        )
    key = "pairs.models" if pairs.models else "model.path"
    for name in models:
        folder = Path(name).expanduser()
        if is_adapter(folder):
            check_adapter(folder, key)
        else:
            local_model_folder(name, None, key)


def check_judge(pairs: PairsConfig, *, is_needed: bool = True) -> None:
    """Check that there is one judge, or at most one if none is needed."""
    judges = {
        "pairs.reward_model": pairs.reward_model,
        "pairs.function": pairs.function,
        "pairs.endpoint.url": pairs.endpoint.url,
    }
    given = [key for key, value in judges.items() if value is not None]
    if len(given) > 1 or (is_needed and not given):
        raise ConfigError(
            "samples need one judge" if is_needed else "a comparison has one judge",
            where=", ".join(given or judges),
            got=", ".join(given) or "none",
            expected=f"one of {', '.join(judges)}",
            remedy="set one of them" + ("; pairs.method=delta needs no judge" if is_needed else " only"),
        )
    if pairs.function is not None:
        user_function(pairs.function, "pairs.function")
    if pairs.endpoint.url is None:
        check_used("pairs.endpoint", pairs.endpoint, EndpointConfig(), "without pairs.endpoint.url")
    if pairs.endpoint.url is not None and pairs.endpoint.model is None:
        raise ConfigError(
            "the endpoint's model is not given",
            where="pairs.endpoint.model",
            got="null",
            remedy="set it to the name under which the endpoint serves the judge",
        )
