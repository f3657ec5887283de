"""Rules of `pairs`, checked before torch is imported and processes join."""

from pathlib import Path

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.keys import Rule, check, unused
from dpo_dist.config.schema import NO_MODEL, Resume, RunConfig
from dpo_dist.config.user_code import user_function
from dpo_dist.config.verb_options import PairsMethod
from dpo_dist.config.verbs import check_needs
from dpo_dist.data.sources import check_source
from dpo_dist.model.folder import check_adapter, is_adapter, local_model_folder


def responding_models(config: RunConfig) -> list[str]:
    """Return the models that respond, as configured."""
    return list(config.pairs.models) or [config.model.path]


def _samples(config: RunConfig) -> bool:
    return config.pairs.method is PairsMethod.samples


def _responds(config: RunConfig) -> bool:
    return config.pairs.method in (PairsMethod.samples, PairsMethod.delta)


def _selects(config: RunConfig) -> bool:
    return config.pairs.method in (PairsMethod.samples, PairsMethod.scores)


def _two_models(config: RunConfig) -> bool:
    models = responding_models(config)
    return len(models) == len({Path(name).expanduser().resolve() for name in models}) == 2


def _number_of_judges(config: RunConfig) -> int:
    pairs = config.pairs
    return sum(judge is not None for judge in (pairs.reward_model, pairs.function, pairs.endpoint.url))


_JUDGES = "pairs.reward_model pairs.function pairs.endpoint.url"
_EFFECTS = (
    (
        "models max_new_tokens temperature top_p top_k unfinished prompt_parts prompt_part",
        *("method", _responds, "set pairs.method=samples or pairs.method=delta"),
    ),
    ("samples reward_model function endpoint.url", "method", _samples, "set pairs.method=samples"),
    ("select margin", "method", _selects, "set pairs.method=samples or pairs.method=scores"),
    ("top_p top_k", "temperature", lambda c: c.pairs.temperature > 0, "raise pairs.temperature"),
    ("launcher reference", "rounds", lambda c: c.pairs.rounds > 0, "set pairs.rounds"),
)
_ENDPOINT_RULES = (
    *(
        unused(
            f"pairs.endpoint.{name} pairs.endpoint.url",
            lambda c: c.pairs.endpoint.url is not None,
            "set pairs.endpoint.url",
        )
        for name in ("model", "verdicts", "criterion", "parallel_requests")
    ),
    Rule(
        "pairs.endpoint.model",
        lambda c: c.pairs.endpoint.url is not None and c.pairs.endpoint.model is None,
        "the endpoint's model is not given",
        "set it to the name under which the endpoint serves the judge",
    ),
)
_RULES = (
    *_ENDPOINT_RULES,
    *(
        unused(f"pairs.{name} pairs.{other}", is_used, remedy)
        for names, other, is_used, remedy in _EFFECTS
        for name in names.split()
    ),
    Rule(
        "run.resume",
        lambda c: c.run.resume is not Resume.auto,
        "run.resume has no effect on pairs: finished parts are always used again",
        "remove run.resume",
    ),
    Rule(
        "data.train",
        lambda c: any(source.weight != SourceConfig.weight for source in c.data.train),
        "the weight of a source has no effect on pairs",
        "remove it, and set it in the training that reads the pairs",
    ),
    Rule(
        "pairs.prompt_part pairs.prompt_parts",
        lambda c: c.pairs.prompt_part >= c.pairs.prompt_parts,
        "there is no such part of the prompts: the first one is 0",
        "correct one of them",
    ),
    Rule(
        "pairs.temperature pairs.samples",
        lambda c: _samples(c) and c.pairs.temperature == 0 and c.pairs.samples > 1,
        "without a temperature every sample of a model is the same",
        "raise pairs.temperature, or set pairs.samples=1",
    ),
    Rule(
        "pairs.models model.path",
        lambda c: _responds(c) and NO_MODEL in responding_models(c),
        "no model responds to the prompts",
        "set pairs.models=[MODEL], or model.path",
    ),
    Rule(
        "model.revision",
        lambda c: _responds(c) and bool(c.model.revision) and c.model.path not in responding_models(c),
        "model.revision has no effect if model.path is none of pairs.models",
        "remove model.revision",
    ),
    Rule(
        "pairs.models",
        lambda c: c.pairs.method is PairsMethod.delta and not _two_models(c),
        "delta pairs need two models",
        "set pairs.models=[STRONGER,WEAKER]",
    ),
    Rule(
        "pairs.samples",
        lambda c: _samples(c) and len(responding_models(c)) * c.pairs.samples < 2,
        "a pair needs two responses",
        "raise pairs.samples, or name two pairs.models",
    ),
    Rule(
        _JUDGES,
        lambda c: _samples(c) and _number_of_judges(c) != 1,
        "samples need one judge",
        "set one of them; pairs.method=delta needs no judge",
    ),
)


def check_pairs(config: RunConfig) -> None:
    """Check everything that needs no torch, network or other processes; raises DpoDistError."""
    check_needs(config, "pairs")
    check(config, _RULES)
    if _responds(config):
        key = "pairs.models" if config.pairs.models else "model.path"
        for name in responding_models(config):
            folder = Path(name).expanduser()
            if is_adapter(folder):
                check_adapter(folder, key)
            else:
                local_model_folder(name, None, key)
    _check_function(config)
    for source in config.data.train:
        check_source(source)


def check_judge(config: RunConfig) -> None:
    """Check that a comparison has at most one judge, and that it is there."""
    why, remedy = "a comparison has one judge", "set one of them only"
    check(config, (Rule(_JUDGES, lambda c: _number_of_judges(c) > 1, why, remedy), *_ENDPOINT_RULES))
    _check_function(config)


def _check_function(config: RunConfig) -> None:
    if config.pairs.function is not None:
        user_function(config.pairs.function, "pairs.function")
