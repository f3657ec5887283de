"""Check a configuration: declared bounds of every value, then rules between values."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import reduce
from pathlib import PurePath
from typing import Any, get_args

from dpo_dist.config.fields import Declaration, declaration
from dpo_dist.config.identity import plain
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.spelling import likely
from dpo_dist.errors import ConfigError

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
