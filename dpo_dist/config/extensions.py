"""What the rooms above the trainer add to it: verbs, sections of keys, rules, and what a run calls.

The trainer works without these rooms. Each of their folders with a module `extension` adds its `EXTENSION`.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_ROOMS = ("tools", "compat")


class Verb(NamedTuple):
    """A program of the package, `dpo-dist NAME`."""

    module: str
    """The module that `python -m` runs."""
    help: str
    needs: tuple[str, ...] = ()
    """The keys that must be set."""
    reads: tuple[str, ...] = ()
    """Keys and sections of the trainer that a tool reads."""
    is_configured: bool = True
    """Whether the verb takes KEY=VALUE words."""
    reads_data: bool = True
    takes_training: bool = True
    """Whether the verb takes the command line of a training run; `pairs` with rounds does, too."""
    reuses_config: bool = False
    """Whether the verb reads config.yaml in `run.dir` for a command that only names this run."""
    is_one_process: bool = False
    """Whether rank 0 alone works if a launcher starts several processes."""
    takes_word: str = "data.train"
    """The key in the example for a word without a key."""


class Extension(NamedTuple):
    """What one tool adds."""

    verbs: Mapping[str, Verb] = {}
    sections: Mapping[str, Any] = {}
    """Sections of the configuration, by name: what `section` returns."""
    rules: str = ""
    """The module whose `rules_of_verb` returns the rules between keys for a verb, or for "", any verb."""
    hooks: Mapping[str, str] = {}
    """Functions that the trainer calls if they are there, as `module:function`, by the names in `hook`."""


@cache
def extensions() -> tuple[Extension, ...]:
    """Return the extensions of all rooms that are there."""
    package = Path(__file__).parents[1]
    declared = list[Extension]()
    for room in _ROOMS:
        for file in sorted((package / room).glob("*/extension.py")):
            module = importlib.import_module(f"dpo_dist.{room}.{file.parent.name}.extension")
            declared.append(module.EXTENSION)
    # What several tools share, and no verb has, comes first.
    return tuple(sorted(declared, key=lambda extension: bool(extension.verbs)))


def rule_modules() -> list[Any]:
    """Return the modules with the rules of extensions."""
    return [importlib.import_module(extension.rules) for extension in extensions() if extension.rules]


def hook(name: str) -> Callable[..., Any] | None:
    """Return the function of an extension; None without such a one.

    `reporting`: returns the `Reporting` of a run. `run_card`: the text of a model card.
    Of other programs: `equivalents`: our names for theirs; `advice`: what to do about an
    option that has none; `foreign_file`: the error for a file of theirs.
    """
    for extension in extensions():
        if name in extension.hooks:
            module, _, attribute = extension.hooks[name].partition(":")
            function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
            return function
    return None


def ask(name: str, *arguments: Any) -> Any:
    """Return what the function of an extension returns; None without such a one."""
    function = hook(name)
    return None if function is None else function(*arguments)


def meanings_of(name: str, table: str) -> tuple[str, ...]:
    """Return what another program's name means here, in a table such as `keys`, `values`, `verbs`."""
    return ask("equivalents", name, table) or ()
