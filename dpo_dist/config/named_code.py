"""The keys that name Python code to run."""

from collections.abc import Mapping
from typing import Any

from dpo_dist.config.keys import key_rows

NAMED_CODE = {row.name.partition("[]")[0]: row.facts.runs for row in key_rows() if row.facts.runs}
"""The keys that name Python code to run, with the text of a warning; docs/reliability.md lists them."""


COMMAND = "run.after_checkpoint"
"""The key whose code is a command of the shell; the others name functions or switch code on."""


def code_options(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the options in a configuration's plain values that run Python code, as text by key."""
    options = {}
    for key in NAMED_CODE:
        section, _, name = key.partition(".")
        inner = values.get(section)
        value = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(value, list):
            readers = [entry.get("reader") for entry in value if isinstance(entry, dict)]
            readers = list(dict.fromkeys(filter(None, readers)))
            if readers:
                options[key] = f"{key} with reader {', '.join(map(str, readers))}"
        elif value:
            options[key] = f"{key}={'true' if value is True else value}"
    return options


def named_functions(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the functions, `module:function`, in a configuration's plain values, each with its key."""
    functions: dict[str, str] = {}
    for key in NAMED_CODE.keys() - {COMMAND}:
        section, _, name = key.partition(".")
        value = values[section][name]
        entries = [entry["reader"] for entry in value] if isinstance(value, list) else [value]
        functions |= {function: key for function in entries if isinstance(function, str)}
    return functions


def code_warnings(values: Mapping[str, Any]) -> list[str]:
    """Return a warning for each option, in a configuration's plain values, that runs Python code."""
    return [f"warning: {option}: {NAMED_CODE[key]}" for key, option in code_options(values).items()]
