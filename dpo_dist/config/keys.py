"""Every key of a run as a row of plain facts, and the presets of its sections."""

import json
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic_core import PydanticUndefined

from dpo_dist.config.fields import LARGEST_INTEGER, key_facts, schema_fields
from dpo_dist.config.identity import plain
from dpo_dist.config.schema import NO_MODEL, RunConfig
from dpo_dist.config.verbs import EVERY_VERB, VERBS

_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Key:
    """One key, as the schema declares it: `loss.beta`, or `data.train[].path` in the entries of a list.

    `default` is NO_MODEL for a key that must be set; `accepts`: the values in words, if the type lacks them.
    """

    name: str
    type: Any
    default: Any
    meaning: str
    bounds: str
    defines_result: bool
    verbs: tuple[str, ...]
    accepts: str
    declared_in: Any

    @property
    def type_words(self) -> str:
        """The accepted values: `a number, > 0`, `text`."""
        words = self.accepts or describe_type(self.type)
        return f"{words}, {self.bounds}" if self.bounds and not self.accepts else words

    @property
    def default_words(self) -> str:
        """The default as it is written on a command line; empty for a key that must be set."""
        if self.default == NO_MODEL:
            return ""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)


def nested(hint: Any) -> type | None:
    """Return the only schema in a type, also in a list or beside null; None if there is none or several."""
    schemas = _schemas_in(hint)
    return schemas[0] if len(schemas) == 1 else None


def _schemas_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    return [schema for part in get_args(hint) for schema in _schemas_in(part)]


@cache
def _rows() -> list[Key]:
    """Return every key and section, in the order of the schema."""
    return list(_rows_of(RunConfig, "", True, ""))


def _rows_of(kind: Any, prefix: str, defines: bool, verbs: str) -> Iterator[Key]:
    hints = get_type_hints(kind)
    for option, field in schema_fields(kind).items():
        hint, facts, default = hints[option], key_facts(field), field.get_default(call_default_factory=True)
        defining, used_by = defines and not facts.free, facts.verbs or verbs
        limits = [(sign, getattr(limit, name, None)) for limit in field.metadata for name, sign in _SIGNS]
        bounds = [f"{sign} {bound:g}" for sign, bound in limits if bound not in (None, LARGEST_INTEGER)]
        row = Key(
            prefix + option,
            hint,
            NO_MODEL if default is PydanticUndefined else default,
            " ".join((field.description or "").split()),
            " and ".join(bounds),
            defining,
            tuple(used_by.split()),
            facts.accepts,
            kind,
        )
        yield row
        below = f"{row.name}[]." if get_origin(hint) is list else f"{row.name}."
        for inner in _schemas_in(hint):
            yield from _rows_of(inner, below, defining, used_by)


@cache
def key_rows() -> list[Key]:
    """Return every key of a run, in the schema's order; options of two losses may share a name."""
    return [row for row in _rows() if not is_dataclass(row.type)]


@cache
def all_keys() -> dict[str, Key]:
    """Return every key of a run by name, in the order of the schema, without sections."""
    return {row.name: row for row in key_rows()}


@cache
def section_meanings() -> dict[str, str]:
    """Return the meaning of each section, those inside of others too: `{"optim": "AdamW and ...", ...}`."""
    return {row.name: row.meaning for row in _rows() if is_dataclass(row.type)}


@cache
def run_keys() -> dict[str, Any]:
    """Return every key and section that a command line can set, with its type."""
    return {row.name: row.type for row in _rows() if "[]" not in row.name}


def config_dir() -> Path:
    """Return the folder with config.yaml and the groups of presets, in a wheel or a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def group_folders(own_folder: Path | None = None) -> list[Path]:
    """Return the folders of groups, in the order in which they are searched."""
    return [config_dir()] if own_folder is None else [own_folder.resolve(), config_dir()]


def preset_names(group: str, folders: Iterable[Path]) -> list[str]:
    """Return the presets of a group."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def is_within(key: str, above: str) -> bool:
    """Return whether `key` is `above` or below it."""
    return key == above or key.startswith((f"{above}.", f"{above}["))


@cache
def readers(name: str) -> list[str]:
    """Return the verbs that read a key, or any key of a section."""
    rows = [row for key, row in all_keys().items() if is_within(key, name)]
    return [verb for verb in EVERY_VERB.split() if any(verb in row.verbs for row in rows)]


def verb_keys(verb: str, *, trains: bool = False) -> list[str]:
    """Return the keys that a verb reads, and their sections; `trains`: also the keys of a training run."""
    verbs = {verb, "train"} if trains or VERBS[verb].takes_training else {verb}
    return [name for name in run_keys() if not verbs.isdisjoint(readers(name))]


def describe_type(hint: Any) -> str:
    """Return a declared type in a user's words."""
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(map(describe_type, get_args(hint)))
    if get_origin(hint) is list:
        return "a list in brackets: [a,b]"
    if get_origin(hint) is dict:
        return "a mapping"
    if names := choices(hint):
        return "one of " + ", ".join(names)
    if inner := nested(hint):
        return "a mapping with " + ", ".join(schema_fields(inner))
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "any value")


def choices(hint: Any) -> list[str]:
    """Return the names that a type enumerates; empty for other types."""
    if get_origin(hint) is Literal:
        return [str(name) for name in get_args(hint)]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    if get_origin(hint) in (types.UnionType, Union):
        return [name for part in get_args(hint) for name in choices(part)]
    return []


_BARE = re.compile(r"(?!(null|true|false)$|.*: )[A-Za-z_./][\w ./:@+*%?-]*", re.ASCII | re.IGNORECASE)
"""A text inside of brackets that Hydra and YAML read as a text without quotes."""


def as_written(value: Any) -> str:
    """Return a value as a user writes it: `null`, `true`, `0.1`, `[{path: a, limit: 3}]`."""
    value = plain(value, with_free=True)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_in_brackets(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_in_brackets(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def _in_brackets(value: Any) -> str:
    text = as_written(value)
    needs_quotes = isinstance(value, str) and value and not _BARE.fullmatch(value)
    return '"' + text.replace('"', '\\"') + '"' if needs_quotes else text


def strip_indices(where: str) -> str:
    """Return a key without the numbers of entries: `data.train[].path` for `data.train[0].path`."""
    return re.sub(r"\[\d*\]", "[]", where)
