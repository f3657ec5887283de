"""A function of the user, given as `module:function`: a loss (`loss.function`) or a judge (`pairs.function`).

The module is searched for in the current directory and then on Python's path. The source is read once: the
text that is executed is the text of the digest, which is part of the run's digest or of provenance. Modules
that it imports are not part of the digest.
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
