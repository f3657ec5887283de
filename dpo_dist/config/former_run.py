"""The configuration of a run that exists, in place of a command line that repeats it."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dpo_dist.config.existing_run import existing_run
from dpo_dist.config.options import Arguments
from dpo_dist.config.overrides import parse_overrides

_CHOICES = ("experiment", "model", "model.path")
_NAME = "of_run_dir"


@contextlib.contextmanager
def with_former_run(arguments: Arguments) -> Iterator[Arguments]:
    """Yield the arguments with the config.yaml of `run.dir` as their experiment.

    They are yielded unchanged if they choose a model or an experiment themselves, if they have a folder of
    groups, or if the run directory has no config.yaml.

    Args:
        arguments: of a verb that evaluates a run, such as `run.dir=output/a evaluation.data=[hard.jsonl]`.

    Raises:
        ConfigError: `run.dir` is no run directory.
    """
    values = {override.key_or_group: override.value() for override in parse_overrides(arguments.overrides)}
    is_whole = any(choice in values for choice in _CHOICES) or arguments.own_folder is not None
    named = None if is_whole else values.get("run.dir")
    file = None if named is None else existing_run(Path(str(named)).expanduser()).config
    if file is None or not file.is_file():
        yield arguments
        return
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "experiment" / f"{_NAME}.yaml"
        preset.parent.mkdir()
        shutil.copyfile(file, preset)
        overrides = [f"+experiment={_NAME}", *arguments.overrides]
        yield Arguments(arguments.options | {"--config-dir": folder}, overrides)
