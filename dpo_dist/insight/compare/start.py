"""Checks of `compare` before torch is imported and processes join: models, data, judge."""

import re
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.keys import as_written
from dpo_dist.config.rules import Rule, check
from dpo_dist.config.run_folder import RunFolder, is_checkpoint, step_of, without_model
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.formats import check_source
from dpo_dist.data.sources import check_has_evaluation_data
from dpo_dist.data.template import check_template_file
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.pairs.start import check_judge
from dpo_dist.model.folder import local_model_folder

KEY = "compare.models"
_NAMED = re.compile(r"([\w.+ -]+)=(.+)", re.DOTALL)
# Names of folders that say nothing without the folder above.
_USUAL_NAMES = frozenset({RunFolder(Path()).model.name, RunFolder(Path()).checkpoints.name})


@dataclass(frozen=True)
class Compared:
    """A model of the comparison.

    `path` is as given, `location` the folder or hub name of the model itself: of a run, its trained model.
    """

    name: str
    path: str
    location: str

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint, whose weights are exported first."""
        return is_checkpoint(Path(self.location))


def check_comparison(config: RunConfig) -> list[Compared]:
    """Check everything that needs no torch, network or other processes; return the models."""
    models = compared_models(config.compare.models)
    check_has_evaluation_data(config.data, "compare models on", "with responses or without")
    for source in config.data.eval_sources:
        check_source(source)
    check_template_file(config.data.chat_template)
    locations = [model.location for model in models]
    revision = Rule(
        "model.revision!=null model.path compare.models",
        "model.revision has no effect on a comparison without model.path",
        "set model.revision=null; a revision of another model: download it and name its folder",
        lambda c: c.model.path not in locations,
    )
    check(config, [revision])
    check_judge(config)
    return models


def compared_models(written: list[str]) -> list[Compared]:
    """Return the models of `compare.models`."""
    if len(written) < 2:
        raise ConfigError(
            "a comparison needs two models",
            where=KEY,
            got=as_written(written),
            expected="the base and at least one other model",
            remedy="write 'compare.models=[base=./base,output/a,beta05=output/b]'",
        )
    models = []
    for entry in map(str.strip, written):
        named = None if Path(entry).expanduser().exists() else _NAMED.fullmatch(entry)
        name, path = (named[1].strip(), named[2].strip()) if named else ("", entry)
        models.append(Compared(name or _short_name(path), path, _located(path)))
    names = [model.name for model in models]
    twice = next((model for model in models if names.count(model.name) > 1), None)
    if twice is not None:
        raise ConfigError(
            "two models have the same name",
            where=KEY,
            got=f"{twice.name}: {', '.join(model.path for model in models if model.name == twice.name)}",
            remedy="name them: 'compare.models=[first=PATH,second=PATH]'",
        )
    return models


def _located(path: str) -> str:
    folder = Path(path).expanduser()
    run = RunFolder(folder)
    if run.config.is_file() and not (folder / "config.json").is_file():
        if not run.model.is_dir():
            raise without_model(run, KEY, "let the run complete")
        folder = run.model
    elif is_checkpoint(folder):
        return str(folder)
    location = str(folder) if folder.is_dir() else path
    local_model_folder(location, None, KEY, accepts_adapter=True)
    return location


def _short_name(path: str) -> str:
    """Return the last folder of a path, with the run of a checkpoint before it."""
    parts = [part for part in Path(path).expanduser().resolve().parts if part not in _USUAL_NAMES]
    if not Path(path).expanduser().exists():  # a hub name
        return path.rpartition("/")[2]
    return "/".join(parts[-2:]) if step_of(parts[-1]) is not None else parts[-1]
