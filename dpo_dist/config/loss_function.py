"""A user's own loss function: `loss.kind=custom loss.function=module:function`.

The module is searched for in the current directory and then on Python's path. The source is read once: the
text whose digest is part of the run's digest is the text that is executed. Modules that it imports are not
part of the digest.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from dpo_dist.digests import text_digest
from dpo_dist.errors import ConfigError

_KEY = "loss.function"


@dataclass(frozen=True)
class LossFunction:
    """The source of a loss function.

    Attributes:
        module: its dotted name.
        name: the function in it.
        file: the module's file.
        digest: of the file's text.
        text: the file's text.
    """

    module: str
    name: str
    file: Path
    digest: str
    text: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.module}:{self.name} from {self.file} (source digest {self.digest[:8]})"


@cache
def find_loss_function(written: str | None) -> LossFunction:
    """Return the source of `loss.function` without executing it.

    `compose` clears the cache, so that every configuration has the text of its time.

    Raises:
        ConfigError: no function is given, it is not written as `module:function`, or its module has no
            source file.
    """
    if written is None:
        raise ConfigError(
            "loss.kind=custom needs a function",
            where=_KEY,
            got="null",
            expected="module:function",
            remedy="set loss.function=my_losses:my_loss for the function my_loss in my_losses.py",
        )
    module, _, name = written.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        raise ConfigError(
            "loss.function is not the name of a function",
            where=_KEY,
            got=written,
            expected="module:function",
            remedy="write the module with dots and without .py: loss.function=my_losses:my_loss",
        )
    file = _source_file(module)
    try:
        text = importlib.util.decode_source(file.read_bytes())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the source of the loss function cannot be read",
            where=_KEY,
            got=f"{file}: {error}",
            remedy="make the file readable, as Python source in UTF-8",
        ) from error
    return LossFunction(module, name, file, text_digest(text), text)


def loss_function(written: str | None) -> Callable[..., Any]:
    """Return the function that `loss.function` names; its module is executed once for each text.

    Raises:
        ConfigError: as `find_loss_function`, or the module cannot be imported or has no such function.
    """
    return _executed(find_loss_function(written))


def _source_file(module: str) -> Path:
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
            remedy = f"write the module without .py: {_KEY}={module.removesuffix('.py')}:..."
        raise ConfigError(
            "the module of the loss function is not found",
            where=_KEY,
            got=f"{module}, searched for in {Path.cwd()} and on Python's path",
            expected="a module with a source file",
            remedy=remedy,
        )
    return Path(spec.origin)


@cache
def _executed(found: LossFunction) -> Callable[..., Any]:
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
            "the module of the loss function cannot be imported",
            where=_KEY,
            got=f"{found.file}: {type(error).__name__}: {error}".removesuffix(": "),
            remedy=f"correct the module until python -c 'import {found.module}' works",
        ) from error
    function = vars(module).get(found.name)
    if not callable(function):
        functions = _functions(module)
        raise ConfigError(
            "the module of the loss function has no such function",
            where=_KEY,
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
