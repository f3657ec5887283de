"""Code of the user: a function given as `module:function`, and the options that let foreign code run."""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import yaml

from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import read_small, text_digest
from dpo_dist.foundation.text import HIDDEN

LOSS_FUNCTION = "loss.function"


@dataclass(frozen=True)
class UserFunction:
    """The source of a function.

    Attributes:
        module: its dotted name.
        name: the function in it.
        file: the module's file.
        digest: of the file's text.
        text: the file's text.
        key: the configuration key that names it.
    """

    module: str
    name: str
    file: Path
    digest: str
    text: str = field(repr=False)
    key: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name} from {self.file} (source digest {self.digest[:8]})"


@cache
def find_function(written: str | None, key: str = LOSS_FUNCTION) -> UserFunction:
    """Return the source of a function without executing it.

    `compose` clears the cache, so that every configuration has the text of its time.

    Raises:
        ConfigError: no function is given, it is not written as `module:function`, or its module has no
            source file.
    """
    if written is None:
        raise ConfigError(
            f"{key} needs a function",
            where=key,
            got="null",
            expected="module:function",
            remedy=f"set {key}=my_module:my_function for the function my_function in my_module.py",
        )
    module, _, name = written.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        raise ConfigError(
            f"{key} is not the name of a function",
            where=key,
            got=written,
            expected="module:function",
            remedy=f"write the module with dots and without .py: {key}=my_module:my_function",
        )
    file = _source_file(module, key)
    try:
        text = importlib.util.decode_source(file.read_bytes())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the source of {key} cannot be read",
            where=key,
            got=f"{file}: {error}",
            remedy="make the file readable, as Python source in UTF-8",
        ) from error
    return UserFunction(module, name, file, text_digest(text), text, key)


def user_function(written: str | None, key: str = LOSS_FUNCTION) -> Callable[..., Any]:
    """Return the function that is written as `module:function`; its module is executed once for each text.

    Raises:
        ConfigError: as `find_function`, or the module cannot be imported or has no such function.
    """
    return _executed(find_function(written, key))


def _source_file(module: str, key: str) -> Path:
    path = [str(Path.cwd()), *sys.path]
    spec = None
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:length]), path)
        if spec is None:
            break
        path = list(spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        remedy = f"start in the folder of {parts[0]}, or add that folder to PYTHONPATH; on every node"
        if parts[-1] == "py":
            remedy = f"write the module without .py: {key}={module.removesuffix('.py')}:..."
        raise ConfigError(
            f"the module of {key} is not found",
            where=key,
            got=f"{module}, searched for in {Path.cwd()} and on Python's path",
            expected="a module with a source file",
            remedy=remedy,
        )
    return Path(spec.origin)


@cache
def _executed(found: UserFunction) -> Callable[..., Any]:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    spec = importlib.util.spec_from_file_location(found.module, found.file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        parent = found.module.rpartition(".")[0]
        if parent:
            importlib.import_module(parent)
        sys.modules[found.module] = module
        # Not by the loader, which may take older bytecode than the text of the digest.
        exec(compile(found.text, str(found.file), "exec"), vars(module))  # noqa: S102
    except (Exception, SystemExit) as error:  # the user's code can raise anything, and call sys.exit
        sys.modules.pop(found.module, None)
        raise ConfigError(
            f"the module of {found.key} cannot be imported",
            where=found.key,
            got=f"{found.file}: {type(error).__name__}: {error}".removesuffix(": "),
            remedy=f"correct the module until python -c 'import {found.module}' works",
        ) from error
    function = vars(module).get(found.name)
    if not callable(function):
        functions = _functions(module)
        raise ConfigError(
            f"the module of {found.key} has no such function",
            where=found.key,
            got=f"{found.name} in {found.file}",
            expected=f"one of {', '.join(functions)}" if functions else "a function",
            remedy="correct the name after the colon",
        )
    made: Callable[..., Any] = function
    return made


def _functions(module: ModuleType) -> list[str]:
    """Return the names of the functions that `module` defines itself."""
    own = vars(module).items()
    return sorted(
        name for name, value in own if isinstance(value, FunctionType) and value.__module__ == module.__name__
    )


_DOORS = {
    "model.trust_remote_code": "Python code of model folders is run",
    "loss.function": "Python code of the loss is run",
    "pairs.function": "Python code of the judge is run",
}
_CODE_OF_HYDRA = ("defaults", "hydra")
_MOST_BYTES = 2**24
_MOST_LEVELS = 50


def open_doors(config: RunConfig) -> list[str]:
    """Return a line for each option of `config` that runs code of others."""
    values = {
        "model.trust_remote_code": config.model.trust_remote_code,
        "loss.function": config.loss.function,
        "pairs.function": config.pairs.function,
    }
    return [f"warning: {key}={_written(value)}: {_DOORS[key]}" for key, value in values.items() if value]


def read_config(file: Path) -> str:
    """Return the text of a config.yaml.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or has more than 16 MiB, which take minutes to parse.
    """
    return read_small(file, _MOST_BYTES).decode()


def yaml_values(text: str) -> Any:
    """Return the values of a YAML text, of which none is named twice and few levels are nested.

    References (`*NAME`) of references can make a short text an endless value.

    Raises:
        ValueError, yaml.YAMLError: it has references, is nested deeper than any run writes, or is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has references (*NAME), which no run writes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise ValueError("its values are nested deeper than a run writes them")
    return yaml.safe_load(text)


def written_values(text: str) -> dict[str, Any]:
    """Return the values of a config.yaml, which has nothing to be evaluated.

    Raises:
        ValueError, yaml.YAMLError: as `yaml_values`, or it has no keys, interpolations or parts of Hydra.
    """
    content = yaml_values(text)
    if not isinstance(content, dict):
        raise ValueError("it has no keys")
    for name in _CODE_OF_HYDRA:
        if name in content:
            raise ValueError(f"it has the key {name}, which no run writes")
    for key, value in _leaves(content, ""):
        if "${" in f"{key}{value}":
            raise ValueError(f"{key or 'a key'} has an interpolation (${{...}}), which no run writes")
    return content


def check_doors(content: Mapping[str, Any], given: Collection[str], file: Path) -> None:
    """Check that a config.yaml opens no door that the command does not open itself.

    Args:
        content: of the file.
        given: the keys on the command line.
        file: for the error.

    Raises:
        ConfigError: it does.
    """
    for key, value in _leaves(content, ""):
        if value and key in _DOORS and key not in given:
            raise ConfigError(
                f"the configuration of this run asks to run code: {_DOORS[key]}",
                where=str(file),
                got=f"{key}={_written(value)}",
                expected="a run directory without code, or the option on the command line",
                remedy=f"add {key}={_written(value)} to the command if you trust this code",
            )


def check_places(
    content: Mapping[str, Any], made: Collection[str], given: Collection[str], file: Path
) -> None:
    """Check that the folders that a command makes were not chosen by a config.yaml that is read back.

    Args:
        content: of the file.
        made: the keys of these folders.
        given: the keys on the command line.
        file: for the error.

    Raises:
        ConfigError: one would be made outside of the working directory.
    """
    here = Path.cwd()
    for key, value in _leaves(content, ""):
        if key not in made or key in given or not isinstance(value, str):
            continue
        folder = Path(os.path.realpath(os.path.expanduser(value)))  # noqa: PTH111 (no error for an unknown user)
        if not folder.is_dir() and not folder.is_relative_to(here):
            raise ConfigError(
                "the configuration of this run names a folder that does not exist",
                where=f"{file}: {key}",
                got=value,
                expected="a folder that exists, or one below the working directory",
                remedy=f"add {key}=FOLDER to the command",
            )


def check_not_hidden(content: Mapping[str, Any], file: Path) -> None:
    """Check that the model of a config.yaml can be found: its path may have been hidden as a secret.

    Raises:
        ConfigError: it was.
    """
    for key, value in _leaves(content, ""):
        if key == "model.path" and HIDDEN in str(value):
            raise ConfigError(
                "the configuration of this run has no path of the model: a part of it was hidden as a secret",
                where=f"{file}: {key}",
                got=str(value),
                remedy="write the path into this file, or write the command of the run: model.path=... and "
                "its other keys",
            )


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _written(value: Any) -> str:
    return "true" if value is True else str(value)
