"""Every key of a run as a row of plain facts, and the check of values against their declared bounds."""

import json
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache, reduce
from pathlib import PurePath
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from dpo_dist.config.fields import EVERY_VERB, Bounds, Declaration, declaration
from dpo_dist.config.identity import plain
from dpo_dist.config.names import likely
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """One key, as the schema declares it.

    Attributes:
        name: `loss.beta`; `data.train[].path` for a key of the entries of a list.
        type: the declared type.
        default: omegaconf's MISSING for a key that must be set.
        bounds: of a number, or of each number of a list.
        filled: whether text must not be empty.
        defines_result: whether the key is part of the run's digest.
        verbs: the verbs that use it.
        of: the dataclass of the mapping, or of each entry of the list, that the key takes.
        accepts: the accepted values in words, if a rule narrows the type.
    """

    name: str
    type: Any
    default: Any
    meaning: str
    bounds: Bounds
    filled: bool
    defines_result: bool
    verbs: tuple[str, ...]
    of: Any
    accepts: str

    @property
    def type_words(self) -> str:
        """The accepted values: `a number, > 0`, `text, not empty`."""
        if self.accepts:
            return self.accepts
        words = describe_type(self.type) or (
            "any value" if self.of is None else f"null or {describe_type(self.of)}"
        )
        limits = "not empty" if self.filled else str(self.bounds)
        return f"{words}, {limits}" if limits else words

    @property
    def default_words(self) -> str:
        """The default as it is written on a command line; empty for a key that must be set."""
        if self.default == MISSING:
            return ""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)


@cache
def all_keys() -> dict[str, Key]:
    """Return every key of a run by name, in the order of the schema, without sections."""
    return {row.name: row for row in _rows(RunConfig, "", True, ())}


def section_meanings(kind: type = RunConfig, prefix: str = "") -> dict[str, str]:
    """Return the meaning of each section, those inside of others too: `{"optim": "AdamW and ...", ...}`."""
    found = {}
    for field in fields(kind):
        if isinstance(field.type, type) and is_dataclass(field.type):
            name = prefix + field.name
            found[name] = declaration(field).meaning
            found |= section_meanings(field.type, f"{name}.")
    return found


def _rows(kind: type, prefix: str, defines: bool, verbs: tuple[str, ...]) -> Iterator[Key]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        name, hint, declared = prefix + field.name, hints[field.name], declaration(field)
        defining = defines and declared.defines_result
        used_by = verbs if declared.verbs is None else declared.verbs
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _rows(hint, f"{name}.", defining, used_by)
            continue
        yield Key(
            name,
            hint,
            field.default if field.default_factory is NO_DEFAULT else field.default_factory(),
            declared.meaning,
            declared.bounds,
            declared.filled,
            defining,
            used_by,
            declared.of,
            declared.accepts,
        )
        if declared.of is not None:
            below = f"{name}[]." if get_origin(hint) is list else f"{name}."
            yield from _rows(declared.of, below, defining, used_by)


def key_types(kind: type) -> dict[str, Any]:
    """Return every key below a dataclass with its declared type, sections included."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[name] = hint
        if isinstance(hint, type) and is_dataclass(hint):
            found |= {f"{name}.{below}": inner for below, inner in key_types(hint).items()}
    return found


def run_keys() -> dict[str, Any]:
    """Return every key and section that a command line can set, with its declared type."""
    return key_types(RunConfig) | {name: row.type for name, row in all_keys().items() if "[]" not in name}


def readers(name: str) -> list[str]:
    """Return the verbs that read a key, or any key of a section."""
    rows = [row for full, row in all_keys().items() if f"{full}.".startswith(f"{name}.")]
    return [verb for verb in EVERY_VERB.split() if any(verb in row.verbs for row in rows)]


def read_by(name: str) -> str:
    """Return in words which verbs read a key or section: `train, evaluate read loss.beta`."""
    verbs = readers(name)
    return f"{', '.join(verbs)} read{'s' * (len(verbs) == 1)} {name}"


_PATHS = {
    "evaluate": {"model": "evaluation.model", "data": "evaluation.data"},
    "compare": {"model": "compare.models", "data": "data.eval"},
}


def path_key(group: str, verb: str) -> str | None:
    """Return the key by which a verb takes the path of what a group of presets names, if there is one."""
    usual = {"model": "model.path", "data": "data.train", "reference": "reference.path"}
    return _PATHS.get(verb, usual).get(group)


def describe_type(hint: Any) -> str:
    """Return a declared type in a user's words."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(describe_type(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return "a list in brackets: [a,b]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in fields(hint))
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "")


def choices(hint: Any) -> list[str]:
    """Return the names that an enumerated (or optional enumerated) type accepts; empty for other types."""
    parts = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    return [
        member.name for part in parts if isinstance(part, type) and issubclass(part, Enum) for member in part
    ]


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
        expected: accepted values, in the same notation.
    """

    keys: str
    broken: Callable[[RunConfig], bool]
    why: str
    remedy: str
    expected: str = ""


def check(config: RunConfig, rules: Iterable[Rule]) -> None:
    """Raise the first error in `config`.

    Raises:
        ConfigError: a value is out of its bounds, or a rule is broken.
    """
    _check_bounds(config, "")
    for rule in rules:
        if rule.broken(config):
            keys, values = rule.keys.split(), vars(config)
            loss_key = "loss.terms" if config.loss.terms else "loss.kind"
            raise ConfigError(
                rule.why.format(**values),
                where=", ".join(loss_key if key == LOSS else key for key in keys),
                got=", ".join(_value(config, key) for key in keys),
                expected=rule.expected.format(**values),
                remedy=rule.remedy.format(**values),
            )


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


def _value(config: RunConfig, key: str) -> str:
    return "+".join(config.loss.kinds) if key == LOSS else as_written(reduce(getattr, key.split("."), config))


def _check_bounds(section: Any, prefix: str) -> None:
    for field in fields(section):
        for where, value in _entries(prefix + field.name, getattr(section, field.name)):
            if is_dataclass(value):
                _check_bounds(value, f"{where}.")
            else:
                _check_value(where, value, field)


def _entries(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        yield from ((f"{where}[{index}]", entry) for index, entry in enumerate(value))
    else:
        yield where, value


def _unlike_pattern(where: str, value: str, declared: Declaration) -> ConfigError:
    """Return the error for a text that does not match its pattern, with the accepted one that is like it."""
    if declared.pattern.startswith("["):  # it names characters, not values
        return ConfigError(
            f"{where} has other characters than it may have",
            where=where,
            got=repr(value),
            expected=declared.accepts,
            remedy="write it with these characters, or remove the key",
        )
    words = re.findall(r"[\w-]+", declared.accepts)
    named = [word for word in words if re.fullmatch(declared.pattern, word)]
    # The last part of a path, and the names of other trainers.
    own = PurePath(value).name
    found = [own] if re.fullmatch(declared.pattern, own) else likely(own, named)
    return ConfigError(
        f"{where} has no such value",
        where=where,
        got=repr(value),
        expected=declared.accepts,
        remedy=f"did you mean {found[0]}?" if found else "write one of these, or remove the key",
    )


def _has_no_home(path: str) -> bool:
    return path.startswith("~") and os.path.expanduser(path) == path  # noqa: PTH111 (no error)


def _check_value(where: str, value: Any, field: Field[Any]) -> None:
    declared = declaration(field)
    if declared.filled and isinstance(value, str) and not value.strip():
        raise ConfigError(
            f"{where} is empty", where=where, got=repr(value), remedy="write a value, or remove the key"
        )
    if declared.filled and isinstance(value, str) and _has_no_home(value):
        raise ConfigError(
            f"{where} begins with ~, and this home folder is not known",
            where=where,
            got=value,
            expected="~/ for your own home folder, or ~ with the name of a user",
            remedy="write the whole path",
        )
    if declared.pattern and isinstance(value, str) and not re.fullmatch(declared.pattern, value):
        raise _unlike_pattern(where, value, declared)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not declared.bounds.contain(value):
        null = " or null" if type(None) in get_args(field.type) else ""
        expected = str(declared.bounds) or "a finite number"
        raise ConfigError(
            f"{where} is out of range",
            where=where,
            got=f"{value:g}",
            expected=expected + null,
            remedy=f"choose {where} in that range" + (null and ", or null"),
        )
