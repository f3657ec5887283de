"""Values of fields: parsed from JSON, also where a text spells it, without the nulls of tables, or empty."""

import ast
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pyarrow

_EXTENSION = b"ARROW:extension:name"
_EMPTY_TEXTS = ("", "[]", "{}", "null")
GOOD = ("1", "1.0", "true", "good", "chosen", "desirable")
BAD = ("0", "0.0", "-1", "-1.0", "false", "bad", "rejected", "undesirable")
"""Labels of single responses, in lower case."""
NOT_UTF8 = "not UTF-8"


def parse_json(content: bytes | str) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, which does not quote it: also if a key is there twice."""
    try:
        return _JSON.decode(content if isinstance(content, str) else content.decode("utf-8-sig"))
    except UnicodeDecodeError as fault:
        raise ValueError(NOT_UTF8) from fault
    except RecursionError as fault:
        raise ValueError("nested too deeply") from fault


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has a key twice")
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def from_json(value: Any) -> Any:
    """Return the list or object that a text spells in JSON, or as Python prints it; else `value`."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return _JSON.decode(value)
    except (ValueError, RecursionError):
        pass
    is_printed = value.lstrip().startswith(("[{'", "{'"))
    try:
        return ast.literal_eval(value.strip()) if is_printed else value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def json_parsers(fields: Iterable[pyarrow.Field]) -> dict[str, Callable[[Any], Any]]:
    """Return by name what parses the values of Arrow fields that store JSON as text, perhaps deep inside.

    Arrow's own type of such texts is that of values of mixed types in `datasets`.
    """
    return {field.name: parse for field in fields if (parse := _json_parser(field)) is not None}


def _json_parser(field: pyarrow.Field) -> Callable[[Any], Any] | None:
    kind = field.type
    # A type that pyarrow does not know is that of its storage, and the field has its name.
    name = getattr(kind, "extension_name", "") or (field.metadata or {}).get(_EXTENSION, b"").decode()
    if name.endswith("json"):  # "arrow.json", "google:sqlType:json"
        return lambda text: None if text is None else parse_json(text)
    parsers = json_parsers(map(kind.field, range(kind.num_fields)))
    if not parsers or pyarrow.types.is_map(kind):
        return None
    if pyarrow.types.is_struct(kind):
        return partial(with_parsed_json, parsers=parsers)
    [parse] = parsers.values()
    return lambda items: items and list(map(parse, items))


def with_parsed_json(fields: Any, parsers: Mapping[str, Callable[[Any], Any]]) -> Any:
    """Return an object, or None, with the values of `json_parsers`. Raises ValueError: one is no JSON."""
    if not fields:
        return fields
    return {name: parsers[name](value) if name in parsers else value for name, value in fields.items()}


def class_parsers(schema: pyarrow.Schema) -> dict[str, Callable[[Any], Any]]:
    """Return by name what gives the words of labels that `datasets` stores as numbers, in any order."""
    known = {*GOOD, *BAD}
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        given = {name: feature["names"] for name, feature in features.items() if "names" in feature}
        words = {name: dict(enumerate(of)) for name, of in given.items() if known & {*map(str.lower, of)}}
    except (KeyError, TypeError, AttributeError, ValueError):  # a stranger's text, of another kind
        return {}
    return {name: numbered.get for name, numbered in words.items()}


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of objects, with which tables fill what an object lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def has_value(value: Any) -> bool:
    """Return whether a field has content: not an empty text, list or object, also in JSON, and not false."""
    if isinstance(value, str):
        return value.strip() not in _EMPTY_TEXTS
    if isinstance(value, list | tuple | Mapping):
        return len(value) > 0
    return value is not None and value is not False
