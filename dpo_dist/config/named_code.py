"""The keys that name Python code to run, and the guard of strangers' configurations."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

from dpo_dist.config.keys import key_rows
from dpo_dist.config.rules import value_at
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written
from dpo_dist.foundation.remedies import to_write

_ROWS = {row.name: row.facts.runs for row in key_rows() if row.facts.runs}
NAMED_CODE = {name.partition("[]")[0]: warning for name, warning in _ROWS.items()}
"""The keys that name Python code to run, with the text of a warning; docs/reliability.md lists them."""


COMMAND = "run.after_checkpoint"
"""The key whose code is a command of the shell; the others name functions or switch code on."""


def _named(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what each key names, `data.train[].reader` in all entries; true is a model's code."""
    named = dict[str, list[Any]]()
    for name in _ROWS:
        found: list[Any] = [values]
        for part in name.split("."):
            found = [each[part.removesuffix("[]")] for each in found if each]
            if part.endswith("[]"):
                found = list(chain(*found))
        found = list(dict.fromkeys(filter(None, found)))
        if found:
            named[name] = found
    return named


def code_options(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the options in a configuration's plain values that run Python code, as text by key."""
    named = _named(values).items()
    return {name.partition("[]")[0]: f"{name}={', '.join(map(as_written, found))}" for name, found in named}


def named_functions(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the functions, `module:function`, in a configuration's plain values, each with its key."""
    named = [(name, found) for name, found in _named(values).items() if name != COMMAND]
    return {each: name.partition("[]")[0] for name, found in named for each in found if isinstance(each, str)}


def code_warnings(values: Mapping[str, Any]) -> list[str]:
    """Return a warning for each option, in a configuration's plain values, that runs Python code."""
    return [f"warning: {option}: {NAMED_CODE[key]}" for key, option in code_options(values).items()]


def check_code_allowed(config: RunConfig, keys: Collection[str]) -> None:
    """Check that a configuration with values of a run's config.yaml runs only code that the command names.

    The values are read, so that every spelling of a key is the same. `keys`: those that the command sets.

    Raises:
        ConfigError: the run, perhaps a stranger's, asks to run code.
    """
    options = {key: option for key, option in code_options(asdict(config)).items() if key not in keys}
    if not options:
        return
    words = [f"{key}={as_written(value_at(config, key))}" for key in options]
    raise ConfigError(
        "the configuration of this run asks to run code: "
        + ", ".join(dict.fromkeys(NAMED_CODE[key] for key in options)),
        where=f"config.yaml in {config.run.dir}",
        got="; ".join(options.values()),
        expected="a run directory without code, or the option on the command line",
        remedy=to_write(*words, verb="if you trust this code, add"),
    )
