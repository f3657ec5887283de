"""The configuration of a run that exists, in place of a command line that repeats it."""

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from dpo_dist.config.existing_run import existing_run
from dpo_dist.config.foreign_code import (
    check_doors,
    check_not_hidden,
    check_places,
    read_config,
    written_values,
)
from dpo_dist.config.options import Arguments
from dpo_dist.config.overrides import parse_overrides
from dpo_dist.errors import ConfigError, first_line

_CHOICES = ("experiment", "model", "model.path")
_NAME = "of_run_dir"


@contextlib.contextmanager
def with_former_run(arguments: Arguments, made: Collection[str] = ()) -> Iterator[Arguments]:
    """Yield the arguments with the config.yaml of `run.dir` as their experiment.

    They are yielded unchanged if they choose a model or an experiment themselves, if they have a folder of
    groups, or if the run directory has no config.yaml.

    Args:
        arguments: of a verb that evaluates a run, such as `run.dir=output/a evaluation.data=[hard.jsonl]`.
        made: the keys of folders that the verb makes.

    Raises:
        ConfigError: `run.dir` is missing or no run directory, or its config.yaml cannot be read.
    """
    values = {override.key_or_group: override.value() for override in parse_overrides(arguments.overrides)}
    is_whole = any(choice in values for choice in _CHOICES) or arguments.own_folder is not None
    named = None if is_whole else values.get("run.dir")
    if not is_whole and named is None and "--cfg" not in arguments.options:
        raise ConfigError(
            "no run is named",
            where="run.dir",
            expected="the directory of a run: run.dir=output/run-1a2b3c4d",
            remedy="set run.dir; or write the command of the run: model.path=... and its other keys",
        )
    file = None if named is None else existing_run(Path(str(named)).expanduser()).config
    if file is None or not file.is_file():
        yield arguments
        return
    text = _configuration(file, values, made)
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "experiment" / f"{_NAME}.yaml"
        preset.parent.mkdir()
        preset.write_text(f"# @package _global_\n{text}", encoding="utf-8")
        overrides = [f"+experiment={_NAME}", *arguments.overrides]
        yield Arguments(arguments.options | {"--config-dir": folder}, overrides)


def _configuration(file: Path, given: Collection[str], made: Collection[str]) -> str:
    """Return the content of a config.yaml, which another program may have written again without comments.

    Raises:
        ConfigError: it has no keys, cannot be read, asks for code that `given` does not ask for, or
            names a new folder elsewhere.
    """
    try:
        text = read_config(file)
        written_values(text)
        content = OmegaConf.create(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "the configuration of this run cannot be read",
            where=str(file),
            got=first_line(error),
            remedy="restore the file, or write the command of the run: model.path=... and its other keys",
        ) from error
    values: Any = OmegaConf.to_container(content)
    check_doors(values, given, file)
    check_places(values, made, given, file)
    check_not_hidden(values, file)
    # Written again: in the file a comment can be a command to Hydra, such as to move all keys to a section.
    return OmegaConf.to_yaml(content)
