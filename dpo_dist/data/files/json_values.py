"""Parse the JSON of a record, describe why it cannot be parsed; remove nulls that tables add."""

import json
from collections.abc import Mapping
from typing import Any

from dpo_dist.data.records import shown_key

# No record needs as many; Python's own recursion ends at about a thousand.
_MAX_NESTING = 100
_ARGUMENTS = ("arguments", "parameters")


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ValueError: it is no JSON, an object has a key twice, or it is nested too deeply.
    """
    try:
        value = _DECODER.decode(content.decode("utf-8-sig"))
    except RecursionError as fault:
        raise ValueError("nested too deeply") from fault
    if content.count(b"[") + content.count(b"{") > _MAX_NESTING and isinstance(value, dict | list):
        _check_nesting(value)
    return value


def fault_of(fault: ValueError) -> str:
    """Return why parsing failed, without quoting the text."""
    match fault:
        case json.JSONDecodeError():
            return f"{fault.msg} at character {fault.pos + 1}"
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {fault.start + 1}"
    return str(fault)


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of objects, with which tables fill what an object lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def with_given_arguments(value: Any) -> Any:
    """Return a value of a table without the nulls with which it fills the arguments of tool calls."""
    if isinstance(value, Mapping):
        return {
            name: without_nulls(item) if name in _ARGUMENTS else with_given_arguments(item)
            for name, item in value.items()
        }
    return [with_given_arguments(item) for item in value] if isinstance(value, list) else value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {shown_key(twice)} twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_NESTING):
        parts = [part.values() if isinstance(part, dict) else part for part in level]
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError("nested too deeply")
