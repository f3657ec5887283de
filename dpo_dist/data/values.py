"""Values of fields: parsed from JSON, also where a text spells it, without the nulls of tables, or empty."""

import ast
import json
from collections.abc import Mapping
from typing import Any

_NO_VALUES: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {}, ())


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, which does not quote it: also if a key is there twice."""
    try:
        return _JSON.decode(content.decode("utf-8-sig"))
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


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of objects, with which tables fill what an object lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def has_value(value: Any) -> bool:
    """Return whether a field has content: not an empty text, list or object, also in JSON, and not false."""
    if isinstance(value, int | float):
        return value is not False
    return value not in _NO_VALUES and not (isinstance(value, str) and not value.strip())
