"""Code of the user: a function given as `module:function`; and the source of the code that is loaded."""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import content_digest, text_digest

_roots: set[str] = set()
"""The folders in which Python has found the modules of the functions that were imported."""


@dataclass(frozen=True)
class UserFunction:
    """A user's function: its module, the text of the module's file, and a digest of this text."""

    module: str
    name: str
    file: Path
    digest: str
    text: str = field(repr=False)
    key: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name} from {self.file} (source digest {self.digest[:8]})"


@cache
def find_function(name_in_config: str | None, key: str) -> UserFunction:
    """Return the source of a function, `module:function`, without executing it.

    `load_run_config` clears the cache, so that every configuration reads the file anew.
    """
    module, _, name = (name_in_config or "").partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        if not all(part.isidentifier() for part in [*module.split("."), name]):
            raise ImportError("this is not of the form module:function")
        spec = importlib.machinery.PathFinder.find_spec(module) if "." not in module else find_spec(module)
        file = Path(spec.origin if spec and spec.origin else module).with_suffix(".py")
        text = importlib.util.decode_source(file.read_bytes())
    except (ImportError, OSError, SyntaxError, UnicodeDecodeError) as error:
        remedy: str = (
            f"write the module with dots and without .py, {key}=my_module:my_function; start in its "
            "folder, or add it to PYTHONPATH, on every node"
        )
        similar = _similar_function(name_in_config or "", key)
        if similar:
            remedy = f"set {key}={similar}"
        raise ConfigError(
            f"the function of {key} is not found",
            where=key,
            got=f"{name_in_config or 'null'}, searched for in {Path.cwd()} and on Python's path: {error}",
            expected="module:function, of a module with a source file",
            remedy=remedy,
        ) from error
    return UserFunction(module, name, file, text_digest(text), text, key)


def _similar_function(name_in_config: str, key: str) -> str:
    """Return the function that a path or dots name, if it is there: `src/judge.py:score`, `judge.score`."""
    path = name_in_config if ":" in name_in_config else ":".join(name_in_config.rsplit(".", 1))
    module, _, name = path.partition(":")
    dotted = module.removeprefix("./").removesuffix(".py").replace("/", ".")
    similar = f"{dotted}:{name}"
    if similar == name_in_config:
        return ""
    with contextlib.suppress(ConfigError):
        find_function(similar, key)
        return similar
    return ""


def user_function(name_in_config: str | None, key: str) -> Callable[..., Any]:
    """Return the function `module:function`; its module is executed once for each version of its text."""
    return _load(find_function(name_in_config, key))


@cache
def _load(source: UserFunction) -> Callable[..., Any]:
    above = source.module.count(".") + (source.file.stem == "__init__")
    _roots.add(f"{source.file.absolute().parents[above]}{os.sep}")
    spec = importlib.util.spec_from_file_location(source.module, source.file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        if spec.parent:
            importlib.import_module(spec.parent)
        sys.modules[source.module] = module
        # Not by Python's loader: it may run bytecode that is older than the text in the digest.
        exec(compile(source.text, str(source.file), "exec"), vars(module))  # noqa: S102
        function: Callable[..., Any] = getattr(module, source.name)
        if not callable(function):
            raise TypeError(f"{source.name} is no function")
    except (Exception, SystemExit) as error:  # the user's code can raise anything, and call sys.exit
        sys.modules.pop(source.module, None)
        raise ConfigError(
            f"the function of {source.key} cannot be imported",
            where=source.key,
            got=f"{source.file}: {type(error).__name__}: {error}".removesuffix(": "),
            remedy=f"correct the module until python -c 'from {source.module} import {source.name}' works",
        ) from error
    return function


def loaded_sources(packages: Collection[str]) -> dict[str, str]:
    """Return a digest of the source file of each loaded module of `packages`, and of the user's, by name.

    The user's modules are those in the folder of a function that was imported, and in folders below. Not
    those that are installed there (environments often lie in the folder of a project), and not this package,
    whose checkout may be the folder.
    """
    digests = {}
    own_package = __name__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        file = str(getattr(module, "__dict__", {}).get("__file__"))
        package = name.partition(".")[0]
        if package == own_package:
            continue
        is_theirs = package in packages
        if is_theirs or (file.startswith(tuple(_roots)) and f"{os.sep}site-packages{os.sep}" not in file):
            # Of thousands of modules, in which a Path for each would take longest.
            if not (file.endswith(".py") and os.path.isabs(file)):  # noqa: PTH117  (torch.ops says "_ops.py")
                continue
            with contextlib.suppress(OSError):  # it was removed after the import
                digests[name] = _source_digest(file, os.stat(file).st_mtime_ns)  # noqa: PTH116
    return digests


@cache
def _source_digest(file: str, _changed: int) -> str:
    return content_digest([Path(file)])[:8]
