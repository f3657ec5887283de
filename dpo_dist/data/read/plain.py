"""Plain values: JSON without duplicate keys, without the nulls of tables; numbers."""

import json
import math
from collections.abc import Mapping
from typing import Any

from dpo_dist.data.records import UnusableRecordError

NOT_UTF8 = "not UTF-8"
NUMBERS = {"loss_weight": 1.0, "soft_label": 1.0, "margin": 0.0}
"""Numbers with which a record may change its loss, and the value without effect: its weight in the mean, the
probability that its chosen response is the better one, and a margin that is subtracted from `b h`."""
_RANGES = {"loss_weight": (0.0, math.inf), "soft_label": (0.0, 1.0), "margin": (-math.inf, math.inf)}


def parse_json(content: bytes | str) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, also for a duplicate key, without quoting the JSON."""
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        return _JSON.decode(content)
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


def from_json(value: Any) -> Any:
    """Return what a text holds as JSON, None for a blank one; any other value as it is. Raises ValueError."""
    if not isinstance(value, str):
        return value
    return parse_json(value) if value.strip() else None


def without_nulls(value: Any) -> Any:
    """Return a value without null fields: a table writes null for each field that an object lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


def is_given(value: Any) -> bool:
    """Return whether a value has content: not null, blank, empty, or an object of nulls; a flag has."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    if isinstance(value, list | tuple):
        return bool(value)
    return value is not None


def to_number(value: Any) -> float:
    """Return a finite number, perhaps written as text. Raises ValueError or TypeError, also for a flag."""
    number = math.nan if isinstance(value, bool) else float(value)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def finite_numbers(values: Any) -> tuple[float, ...]:
    """Return the values of a list as numbers. Raises UnusableRecordError: `invalid_scores`."""
    try:
        if isinstance(values, list | tuple):
            return tuple(map(to_number, values))
    except (TypeError, ValueError, OverflowError):
        pass
    raise UnusableRecordError("invalid_scores", "a score is missing, or is not a finite number")


def record_numbers(values: Mapping[str, Any], responses: int) -> dict[str, float]:
    """Return those of a record's `NUMBERS` that have an effect."""
    numbers = dict[str, float]()
    for name, (least, most) in _RANGES.items():
        if values.get(name) in (None, ""):
            continue
        try:
            number = to_number(values[name])
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not least <= number <= most:
            raise UnusableRecordError("invalid_numbers", f"{name} is not a number from {least:g} to {most:g}")
        if number == NUMBERS[name]:
            continue
        if responses != 2 and name != "loss_weight":
            raise UnusableRecordError("invalid_numbers", f"{name} of a record that is no pair")
        numbers[name] = number
    return numbers
