"""Code of the user: a function given as `module:function`, and the options that let foreign code run."""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import yaml

from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import text_digest

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

    `load_run_config` clears the cache, so that every configuration has the text of its time.

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
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        spec = importlib.machinery.PathFinder.find_spec(module) if "." not in module else find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"the module of {key} is not found",
            where=key,
            got=f"{module}, searched for in {Path.cwd()} and on Python's path",
            expected="a module with a source file",
            remedy=f"start in the folder of {module.partition('.')[0]}, or add that folder to PYTHONPATH; on "
            "every node; write the module without .py",
        )
    return Path(spec.origin)


@cache
def _executed(found: UserFunction) -> Callable[..., Any]:
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
        OSError, UnicodeDecodeError: it cannot be read.
    """
    return file.read_text(encoding="utf-8")


def written_values(text: str) -> dict[str, Any]:
    """Return the values of a config.yaml, which has nothing to be evaluated.

    Raises:
        ValueError, yaml.YAMLError: it has no keys, or interpolations or parts of Hydra, which no run writes.
    """
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError("it has no keys")
    if "${" in text or not content.keys().isdisjoint(_CODE_OF_HYDRA):
        raise ValueError("it has an interpolation (${...}), defaults or hydra, which no run writes")
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
    for key, meaning in _DOORS.items():
        section, _, name = key.partition(".")
        inner = content.get(section)
        if isinstance(inner, dict) and (value := inner.get(name)) and key not in given:
            raise ConfigError(
                f"the configuration of this run asks to run code: {meaning}",
                where=str(file),
                got=f"{key}={_written(value)}",
                expected="a run directory without code, or the option on the command line",
                remedy=f"add {key}={_written(value)} to the command if you trust this code",
            )


def _written(value: Any) -> str:
    return "true" if value is True else str(value)
