"""Every key with its declared type, and that type as a user would say it."""

import types
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from dpo_dist.config.schema import AdapterConfig, RunConfig


def key_types(kind: type) -> dict[str, Any]:
    """Every key below a dataclass with its declared type, sections included: `{"loss.beta": float, ...}`."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[name] = hint
        if isinstance(hint, type) and is_dataclass(hint):
            found |= {f"{name}.{below}": inner for below, inner in key_types(hint).items()}
    return found


def run_keys() -> dict[str, Any]:
    """Every key that a command line can set, those of an adapter included."""
    adapter = {f"model.adapter.{name}": hint for name, hint in key_types(AdapterConfig).items()}
    return key_types(RunConfig) | adapter


def in_words(hint: Any) -> str:
    """A declared type as a user would say it."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(in_words(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return "a list in brackets: [a,b]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in fields(hint))
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "")


def choices(hint: Any) -> list[str]:
    """The names that an enumerated type, or an optional one, can be set to; empty for other types."""
    parts = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    return [
        member.name for part in parts if isinstance(part, type) and issubclass(part, Enum) for member in part
    ]
