"""Every key of a run as a row of plain facts, and the rules between values."""

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache, reduce
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dpo_dist.config.fields import EVERY_VERB, default_of, facts_of, fields_of
from dpo_dist.config.identity import plain
from dpo_dist.config.schema import NO_MODEL, RunConfig
from dpo_dist.foundation.errors import ConfigError

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Key:
    """One key, as the schema declares it.

    Attributes:
        name: `loss.beta`; `data.train[].path` for a key of the entries of a list.
        type: the declared type.
        default: NO_MODEL for a key that must be set.
        bounds: of a number, in words.
        defines_result: whether the key is part of the run's digest.
        verbs: the verbs that use it.
        accepts: the accepted values in words, if the type does not say them.
    """

    name: str
    type: Any
    default: Any
    meaning: str
    bounds: str
    defines_result: bool
    verbs: tuple[str, ...]
    accepts: str

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
    """Return the schema that a type is, or has inside of a list or beside null."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((found for part in get_args(hint) if (found := nested(part))), None)


@cache
def _rows() -> dict[str, Key]:
    """Return every key and section, in the order of the schema."""
    return {row.name: row for row in _rows_of(RunConfig, "", True, "")}


def _rows_of(kind: Any, prefix: str, defines: bool, verbs: str) -> Iterator[Key]:
    hints = get_type_hints(kind)
    for option, field in fields_of(kind).items():
        hint, facts, default = hints[option], facts_of(field), default_of(field)
        defining, used_by = defines and not facts.free, facts.verbs or verbs
        row = Key(
            prefix + option,
            hint,
            NO_MODEL if default is PydanticUndefined else default,
            field.description or "",
            " and ".join(_bounds(field)),
            defining,
            tuple(used_by.split()),
            facts.accepts,
        )
        yield row
        if (inner := nested(hint)) is not None:
            below = f"{row.name}[]." if get_origin(hint) is list else f"{row.name}."
            yield from _rows_of(inner, below, defining, used_by)


def _bounds(field: FieldInfo) -> Iterator[str]:
    for limit in field.metadata:
        for name, sign in _SIGNS.items():
            bound = getattr(limit, name, None)
            if bound is not None and abs(bound) < 2**62:  # those of whole numbers of 64 bits
                yield f"{sign} {bound:g}"


@cache
def all_keys() -> dict[str, Key]:
    """Return every key of a run by name, in the order of the schema, without sections."""
    return {name: row for name, row in _rows().items() if not is_dataclass(row.type)}


@cache
def section_meanings() -> dict[str, str]:
    """Return the meaning of each section, those inside of others too: `{"optim": "AdamW and ...", ...}`."""
    return {name: row.meaning for name, row in _rows().items() if is_dataclass(row.type)}


@cache
def run_keys() -> dict[str, Any]:
    """Return every key and section that a command line can set, with its type."""
    return {name: row.type for name, row in _rows().items() if "[]" not in name}


def readers(name: str) -> list[str]:
    """Return the verbs that read a key, or any key of a section."""
    found = {
        verb
        for key, row in all_keys().items()
        if key == name or key.startswith(f"{name}.")
        for verb in row.verbs
    }
    return [verb for verb in EVERY_VERB.split() if verb in found]


def read_by(name: str) -> str:
    """Return which verbs read a key, in a sentence."""
    verbs = readers(name)
    return f"{' and '.join(verbs)} read{'s' if len(verbs) == 1 else ''} {name}"


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
        return "a mapping with " + ", ".join(fields_of(inner))
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "any value")


def choices(hint: Any) -> list[str]:
    """Return the names that a type enumerates; empty for other types."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.name for member in hint]
    if get_origin(hint) in (types.UnionType, Union):
        return [name for part in get_args(hint) for name in choices(part)]
    return []


LOSS = "loss"
"""As a key of a rule: `loss.kind`, or `loss.terms` if the loss is made of terms."""


@dataclass(frozen=True)
class Rule:
    """A rule between values.

    Attributes:
        keys: the keys of these values, separated by spaces; they give an error's `where` and `got`.
        broken: whether a configuration breaks the rule.
        why: the error in one sentence; `{model.attention}` is replaced by the value of that key.
        remedy: the keys to set or remove, in the same notation.
    """

    keys: str
    broken: Callable[[RunConfig], bool]
    why: str
    remedy: str

    def error(self, config: RunConfig) -> ConfigError:
        """Return the error of a configuration that breaks the rule."""
        loss_key = "loss.terms" if config.loss.terms else "loss.kind"
        return ConfigError(
            self.why.format(**vars(config)),
            where=", ".join(loss_key if key == LOSS else key for key in self.keys.split()),
            got=", ".join(_value(config, key) for key in self.keys.split()),
            remedy=self.remedy.format(**vars(config)),
        )


def unused(keys: str, unless: Callable[[RunConfig], bool], remedy: str) -> Rule:
    """Return the rule that a key is at its default, unless it has an effect.

    Args:
        keys: the key, and those on which its effect depends.
        unless: whether it has an effect.
        remedy: what gives it one.
    """
    key, *others = keys.split()
    default = _rows()[key].default
    return Rule(
        keys,
        lambda config: _at(config, key, default) != default and not unless(config),
        f"{key} has no effect with this {' and '.join(others)}",
        f"remove {key}, or {remedy}",
    )


COMMAND_LINE = "command line"
_NEXT_LINE = "\n" + " " * 12


def raise_all(mistakes: Sequence[ConfigError]) -> None:
    """Raise one error for all mistakes, of several with a line each; without any do nothing."""
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        lines = list(dict.fromkeys(map(_line, mistakes)))
        raise ConfigError(f"this command has {len(lines)} mistakes", remedy=_NEXT_LINE.join(lines))


def _line(mistake: ConfigError) -> str:
    where = mistake.where.removeprefix(COMMAND_LINE).removeprefix(": ")
    got = "" if not mistake.got or "=" in where else f" ({mistake.got})"
    return f"{where or mistake.got}{got if where else ''}: {mistake.message}; {mistake.remedy}"


def check(config: RunConfig, rules: Iterable[Rule]) -> None:
    """Raise one error with every rule that a configuration breaks."""
    raise_all([rule.error(config) for rule in rules if rule.broken(config)])


def _at(config: RunConfig, key: str, absent: Any = None) -> Any:
    """Return the value of a key; `absent` for one of an adapter without an adapter."""
    if key.startswith("model.adapter.") and config.model.adapter is None:
        return absent
    return reduce(getattr, key.split("."), config)


def _value(config: RunConfig, key: str) -> str:
    return "+".join(config.loss.kinds) if key == LOSS else as_written(_at(config, key))


def as_written(value: Any) -> str:
    """Return a value as a user writes it: `null`, `true`, `0.1`, `[{path: a, limit: 3}]`."""
    value = plain(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {as_written(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_written(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def entry_of(where: str) -> str:
    """Return a name as the table of keys has it: `data.train[].path` for `data.train[0].path`."""
    return re.sub(r"\[\d*\]", "[]", where)
