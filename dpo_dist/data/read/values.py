"""Values of fields: JSON, also inside texts, without the nulls of tables; numbers; empty values."""

import ast
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_dist.data.records import UnusableRecordError

_EMPTY_TEXTS = ("", "[]", "{}", "null")
ARGUMENTS = ("arguments", "parameters", "args", "input", "action_input", "tool_input", "kwargs", "params")
"""Keys with the arguments of a tool call: of OpenAI, Llama, LangChain and Gemini, Anthropic, agents."""
NOT_UTF8 = "not UTF-8"


def parse_json(content: bytes | str) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, also for a duplicate key, without quoting the JSON."""
    try:
        return _JSON.decode(content if isinstance(content, str) else content.decode("utf-8-sig"))
    except UnicodeDecodeError as fault:
        raise ValueError(NOT_UTF8) from fault
    except RecursionError as fault:
        raise ValueError("nested too deeply") from fault


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def from_json(value: Any, *, of_texts: bool = False) -> Any:
    """Return the list or object that a text holds as JSON, or as Python prints it; else `value`.

    A list of texts as Python prints it is read as a list only if the field has lists `of_texts`.
    """
    if not may_be_json(value):
        return value
    try:
        return _JSON.decode(value)
    except (ValueError, RecursionError):
        pass
    is_printed = value.lstrip().startswith(("[{'", "{'", *["['"] * of_texts))
    try:
        return ast.literal_eval(value.strip()) if is_printed else value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def without_nulls(value: Any) -> Any:
    """Return a value without null fields: a table writes null for each field that an object lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def may_be_json(value: Any) -> bool:
    """Return whether a value is a text that may hold a list or an object."""
    return isinstance(value, str) and value.lstrip().startswith(("[", "{"))


def has_value(value: Any) -> bool:
    """Return whether a field has content: not an empty text, list or object, also in JSON, and not false."""
    if value is None or value is False:
        return False
    if isinstance(value, str):
        return value.strip() not in _EMPTY_TEXTS
    return len(value) > 0 if isinstance(value, list | tuple | Mapping) else True


def with_value(fields: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the names of those fields that have content."""
    return [name for name in names if name in fields and has_value(fields[name])]


def finite_numbers(values: Iterable[Any]) -> tuple[float, ...]:
    """Return the values as finite numbers. Raises UnusableRecordError if any is not."""
    given = values if isinstance(values, Iterable) and not isinstance(values, str | Mapping) else ()
    numbers = tuple(math.nan if isinstance(value, bool) else to_number(value) for value in given)
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UnusableRecordError("invalid_scores", "a score is missing, or is not a finite number")
    return numbers


def to_number(value: Any) -> float:
    """Return a number, perhaps written as text; nan for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
