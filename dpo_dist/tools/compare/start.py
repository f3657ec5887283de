"""Check models, data and judge of `compare` before torch is imported and processes join."""

import re
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.data import DataSource
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written
from dpo_dist.kit import Rule, RunConfig, check_rules, locate_model, short_name
from dpo_dist.tools.sampling.judge_rules import JUDGES, check_function, count_judges, endpoint_rules
from dpo_dist.tools.sampling.keys import CompareConfig, PairsConfig

MODELS_KEY = "compare.models"
_NAMED = re.compile(r"([\w.+ -]+)=(.+)", re.DOTALL)
_ONE_JUDGE = Rule(
    JUDGES,
    "a comparison has one judge",
    "set one of them only",
    lambda c: count_judges(c.section_of(PairsConfig)) > 1,
)


@dataclass(frozen=True)
class NamedModel:
    """A model of the comparison.

    `path` is as configured; `location` is the model's folder or hub name (for a run: its trained model).
    """

    name: str
    path: str
    location: str


def check_comparison(config: RunConfig) -> list[NamedModel]:
    """Check everything that needs no torch, network or other processes; return the models."""
    models = compared_models(config.section_of(CompareConfig).models)
    config.data.check_has_evaluation_data()
    for source in config.data.eval_sources:
        DataSource(source, "data.eval" if config.data.eval else "data.train").check(of_prompts=True)
    locations = [model.location for model in models]
    revision = Rule(
        "model.revision!=null model.path compare.models",
        "model.revision has no effect on a comparison without model.path",
        "set model.revision=null; a revision of another model: download it and name its folder",
        lambda c: c.model.path not in locations,
    )
    check_rules(config, [revision])
    check_rules(config, [*endpoint_rules(lambda _: 2), _ONE_JUDGE])
    check_function(config.section_of(PairsConfig))
    return models


def compared_models(entries: list[str]) -> list[NamedModel]:
    """Return the two models of `compare.models`."""
    if len(entries) != 2:
        raise ConfigError(
            "a comparison has two models",
            where=MODELS_KEY,
            got=as_written(entries),
            remedy="name them, for example 'compare.models=[base=./base,output/a]'; of three models each two "
            "have a comparison",
        )
    models = []
    for entry in map(str.strip, entries):
        name = ""
        path = entry
        match = None if Path(entry).expanduser().exists() else _NAMED.fullmatch(entry)
        if match:
            name, path = map(str.strip, match.groups())
        models.append(NamedModel(name or short_name(path), path, locate_model(path, MODELS_KEY)))
    first, second = models
    if first.name == second.name:
        raise ConfigError(
            "both models have the same name",
            where=MODELS_KEY,
            got=f"{first.name}: {first.path}, {second.path}",
            remedy="name them: 'compare.models=[first=PATH,second=PATH]'",
        )
    return models
