"""Declare configuration keys, and write their types and values for people.

Pydantic checks types and bounds; `Facts` are for help and digest.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import pydantic.dataclasses
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from dpo_dist.foundation.remote import check_place

T = TypeVar("T")
LARGEST_INTEGER = 2**53
"""Largest integer of any key: JSON keeps it exactly, and sums of several fit into 64 bits."""
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


EVERY_READER = "*"
"""The verbs that read records."""


@dataclass(frozen=True)
class Facts:
    """Facts about a key that pydantic's field does not hold."""

    free: bool = False
    """Not part of the run's digest: hardware, placement, how often something is written."""
    verbs: str = ""
    """The verbs that read the key, separated by spaces, or `EVERY_READER`; empty: its section's verbs."""
    accepts: str = ""
    """The accepted values in words, where the type does not say them."""
    null_means: Any = None
    runs: str = ""
    """The warning of a key that names Python code to run."""

    def __call__(self, json_schema: JsonDict) -> None:
        """Add nothing to the JSON schema of a key: pydantic keeps only what it can call for it."""


def key(
    default: Any,
    *,
    free: bool = False,
    verbs: str = "",
    accepts: str = "",
    null_means: Any = None,
    runs: str = "",
    **limits: Any,
) -> Any:
    """Declare a key with `Facts` and pydantic's limits such as `gt=0`; the text below it is its meaning."""
    if isinstance(default, list):
        limits["default_factory"] = lambda: copy(default)
    else:
        limits["default"] = default
    return Field(json_schema_extra=Facts(free, verbs, accepts, null_means, runs), **limits)


def section(kind: type, *, free: bool = False, verbs: str = "") -> Any:
    """Declare a section with the keys of the schema `kind`, whose docstring is the section's meaning."""
    facts = Facts(free, verbs)
    return Field(default_factory=kind, description=kind.__doc__ or "", json_schema_extra=facts)


@dataclass_transform(frozen_default=True)
def schema(cls: type[T]) -> type[T]:
    """Make a class of keys a frozen dataclass that refuses unknown keys; `validated` refuses other types."""
    hints = get_type_hints(cls)

    def read(_: type[T], value: Any, info: ValidationInfo) -> Any:
        return _read(value, hints[str(info.field_name)])

    cls.__read_keys__ = field_validator("*", mode="before")(classmethod(read))  # type: ignore[attr-defined]
    return cast(type[T], pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)(cls))


def validated(kind: TypeAdapter[T], values: Any) -> T:
    """Return values as JSON has them in the types of a schema.

    true is no number, 1.5 no integer, "1" and "true" are texts.

    Raises:
        ValidationError: a key is unknown, or a value has another type or does not keep a limit.
    """
    return kind.validate_json(json.dumps(values, default=str), strict=True)


def _read(value: Any, hint: Any) -> Any:
    """Return a value as the type of its key has it: `none` as null, 1e3 as 1000, a text as a list of one."""
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    is_text = isinstance(value, str)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    takes_number = not {int, float}.isdisjoint(kinds)
    if is_text and value.lower() == "none" and NoneType in kinds and "none" not in choices(hint):
        return None
    if is_text and lists and str not in kinds and value not in choices(hint):
        value = [value]
    if is_number and str in kinds and not takes_number:
        return str(value)
    if is_number and int in kinds and float not in kinds:
        if abs(value) > LARGEST_INTEGER:
            raise PydanticCustomError("too_large", "too large", {"allowed": f", <= {LARGEST_INTEGER:,}"})
        return int(value) if float(value).is_integer() else value
    if isinstance(value, list) and lists:
        return [_read(entry, get_args(lists[0])[0]) for entry in value]
    return value


def as_entry(name: str) -> Callable[[Any], Any]:
    """Return a function that turns a bare text into `{name: text}`."""
    return lambda entry: {name: entry} if isinstance(entry, str) else entry


def schema_fields(kind: Any) -> Mapping[str, FieldInfo]:
    """Return the fields of a schema or of an instance."""
    fields: Mapping[str, FieldInfo] = kind.__pydantic_fields__
    return fields


def key_facts(field: FieldInfo) -> Facts:
    """Return the `Facts` that `key` or `section` declared."""
    return cast(Facts, field.json_schema_extra)


NonEmpty = Annotated[str, Field(pattern=r"\S")]
"""Text that is not empty: a path, a name."""
Names = Annotated[list[NonEmpty], Field(min_length=1)]
Place = Annotated[NonEmpty, AfterValidator(check_place)]
"""A path, the name of a model or dataset on the hub, or a URL."""


def nested(hint: Any) -> type | None:
    """Return the only schema in a type, also in a list or beside null; None if there is none or several."""
    schemas = schemas_in(hint)
    return schemas[0] if len(schemas) == 1 else None


def schemas_in(hint: Any) -> list[type]:
    """Return the schemas in a type: of the entries of a list, of a mapping or null, of each alternative."""
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    return [*itertools.chain.from_iterable(map(schemas_in, get_args(hint)))]


def describe_type(hint: Any) -> str:
    """Return a declared type in a user's words."""
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(map(describe_type, get_args(hint)))
    if get_origin(hint) is list:
        return "a list in brackets: [a,b]"
    if get_origin(hint) is dict:
        return "a mapping"
    names = choices(hint)
    if names:
        return "one of " + ", ".join(names)
    inner = nested(hint)
    if inner:
        return "a mapping with " + ", ".join(schema_fields(inner))
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "any value")


def choices(hint: Any) -> list[str]:
    """Return the names that a type enumerates; empty for other types."""
    if get_origin(hint) is Literal:
        return list(map(str, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    if get_origin(hint) in (UnionType, Union):
        return [*itertools.chain.from_iterable(map(choices, get_args(hint)))]
    return []


_BARE = re.compile(r"(?!(null|true|false)$|.*: )[A-Za-z_./][\w ./:@+*%?-]*", re.ASCII | re.IGNORECASE)
"""A text inside of brackets that Hydra and YAML read as a text without quotes."""


def as_written(value: Any) -> str:
    """Return a value as a user writes it: `null`, `true`, `0.1`, `[{path: a, limit: 3}]`."""
    value = plain(value, with_free=True)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_in_brackets(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_brackets, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value) or "''"


def _in_brackets(value: Any) -> str:
    text = as_written(value)
    needs_quotes = isinstance(value, str) and value and not _BARE.fullmatch(value)
    return '"' + text.replace('"', '\\"') + '"' if needs_quotes else text


def plain(value: Any, *, with_defaults: bool = False, with_free: bool = False) -> Any:
    """Return `value` without dataclasses and enums; a dataclass becomes its keys that define the result.

    Keys at their default are left out unless `with_defaults`; a null becomes the value that it means.
    `with_free`: with the keys that do not define the result.
    """
    if isinstance(value, list):
        return [plain(item, with_defaults=with_defaults, with_free=with_free) for item in value]
    if not is_dataclass(value):
        return str(value) if isinstance(value, str) else value
    content = {}
    for option, field in schema_fields(value).items():
        item = getattr(value, option)
        facts = key_facts(field)
        usual = (field.get_default(call_default_factory=True), facts.null_means)
        is_wanted = (with_free or not facts.free) and (with_defaults or item not in usual)
        if is_wanted:
            effective = facts.null_means if item is None else item
            plain_item = plain(effective, with_defaults=with_defaults, with_free=with_free)
            if with_defaults or option != "options" or plain_item:  # {}: the defaults of the kind of loss
                content[option] = plain_item
    return content


def plain_values(section: Any) -> dict[str, Any]:
    """Return the values of a section, or of a whole configuration, without enums."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(section)))
    return values
