"""Code on a model's layers that is not of the libraries that train it: hooks and forwards of a script.

A hook that only reads what layers compute expects the rows of a batch, and changes no log-prob that a
comparison could find.
"""

import functools
import sys
from collections.abc import Iterable
from importlib import metadata
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

from dpo_dist.model.library_internals import attention_function

_LIBRARIES = {"accelerate", "deepspeed", "dpo_dist", "peft", "torch", "transformers", "trl"}
"""Packages whose forwards and hooks of layers compute what transformers does."""
_OF_THE_MODEL = "transformers_modules"
"""Where transformers puts the code of a model that is not among its own."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def foreign_code(model: nn.Module) -> str:
    """Return the packages whose hooks, or forwards without a version, a model's layers call."""
    layers = [name for name in others_layers(model) if name != _OF_THE_MODEL and not packages_of(name)]
    return ", ".join(sorted({*layers, *others_hooks(model)}))


def others_layers(model: nn.Module) -> list[str]:
    """Return the packages of layers and of their forwards, but those that compute as transformers does."""
    kinds = {type(layer) for layer in model.modules()}
    of_kinds = {_top_level(kind.__module__) for kind in kinds}
    functions: list[Any] = [part for kind in kinds for part in (kind.forward, kind.__call__)]
    functions.append(attention_function(model))
    # Also what a script has put on a layer, or in place of a function that the layers' modules call.
    holders = [*model.modules(), *(sys.modules[kind.__module__] for kind in kinds)]
    functions += [value for holder in holders for value in vars(holder).values()]
    of_functions = _packages(filter(_is_python, functions))
    return sorted((of_kinds | of_functions) - _LIBRARIES - sys.stdlib_module_names)


def _is_python(value: Any) -> bool:
    return isinstance(value, FunctionType | MethodType | functools.partial)


def others_hooks(model: nn.Module) -> list[str]:
    """Return the packages of hooks on layers, and of those on all modules, but the libraries'."""
    holders = [vars(torch_modules)[f"_global{kind}"] for kind in _HOOKS]
    for layer in model.modules():
        holders += [getattr(layer, kind) for kind in _HOOKS]
    return sorted(_packages(hook for hooks in holders for hook in hooks.values()) - _LIBRARIES)


def _packages(functions: Iterable[Any]) -> set[str]:
    """Return the packages of functions, and of all that these wrap.

    `functools.wraps` copies the name of a module: only a function's global names say where it was written.
    """
    found = set[str]()
    waiting = [*functions]
    while waiting:
        function = waiting.pop()
        if hasattr(function, "__wrapped__"):
            waiting.append(function.__wrapped__)
        if isinstance(function, functools.partial):
            waiting.append(function.func)
            continue
        found.add(_top_level(function.__module__))
        if hasattr(function, "__globals__"):
            found.add(_top_level(function.__globals__.get("__name__")))
    return found


def _top_level(module: str | None) -> str:
    return str(module).partition(".")[0]


@functools.cache
def packages_of(module: str) -> str:
    """Return the installed packages that have a module, with their versions; empty: it is a script's own."""
    packages = sorted({*metadata.packages_distributions().get(module, ())})
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)
